"""The compiled part of the package; where there is none, plain PyTorch stands in for it."""

import os
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from secondorder._warnings import warn

VARIABLE = "SECONDORDER_PURE_PYTHON"


def _load() -> ModuleType | None:
    """Imports `secondorder._C`, which registers the kernels; warns once where it cannot be imported."""
    choice = os.environ.get(VARIABLE, "0")
    if choice not in ("0", "1"):
        raise ImportError(f"secondorder: expected {VARIABLE} to be 0 or 1, got {choice!r}")
    if choice == "1":
        return None
    try:
        extension = import_module("secondorder._C")
    except ImportError as error:
        source = Path(__file__).parents[1]
        hides = f" {source} is the source folder, and hides a package that is installed: to use that, run elsewhere."
        warn(
            f"its compiled extension is missing or does not fit this torch ({torch.__version__}): {error}. Plain PyTorch stands "
            "in for it: the same steps, several times as slow (docs/install.md). Compile it against the installed torch, "
            "`pip install --no-build-isolation --force-reinstall --no-deps .` in the source folder, or set "
            f"{VARIABLE}=1 to go without it and without this warning.{hides if (source / 'setup.py').exists() else ''}"
        )
        return None
    built = extension.build_info()["torch"]
    if built.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise ImportError(
            f"secondorder: its extension was compiled against torch {built}, this is {torch.__version__}, and torch's binary "
            "interface changes from one minor release to the next. Install it anew, or set "
            f"{VARIABLE}=1 to go without the extension."
        )
    return extension


compiled = _load()
"""`secondorder._C`, or None."""
