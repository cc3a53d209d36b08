"""Finds `corl` for a worker that has the stand-ins on its path and nothing else of ours."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

if "corl" not in sys.modules:
    # By its place and not by the path, so that our other packages stay hidden.
    spec = importlib.util.spec_from_file_location("corl", ROOT / "corl" / "__init__.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{ROOT} holds no corl")
    sys.modules["corl"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["corl"])

from corl.shim.options import current  # noqa: E402

options = current()
if any((options.cuda_is_cpu, options.old_python, options.old_numpy, options.old_jax)):
    # Not without need: this imports torch, which takes seconds.
    from corl.shim import patches

    patches.in_worker()
