"""The host: tasks, environments, data, runs and the parts of a fine-tuning loop.

A fork of the common parts of CORL (https://github.com/tinkoff-ai/CORL). It knows no method: the
algorithm files in `algorithms/` bring their own losses and loops.
"""

__version__ = "0.1.0"
