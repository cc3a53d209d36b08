"""DARE (Dynamic Alignment for RElease) as a plugin to CORL-style single-file RL."""

__version__ = "0.1.0"
