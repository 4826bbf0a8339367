"""Warnings that point at the user's own line, however deep in the package and in torch they come from."""

import sys
import warnings
from pathlib import Path
from types import FrameType

import torch

# Frames in these folders are not the user's.
_FOLDERS = tuple(str(Path(file).parent) for file in (__file__, torch.__file__) if file)
_IMPORT = "<frozen importlib._bootstrap"


def warn(message: str) -> None:
    """Warns at the user's line that has led here."""
    level, frame = 1, sys._getframe(1)
    current: FrameType | None = frame
    while current is not None and current.f_code.co_filename.startswith((*_FOLDERS, _IMPORT)):
        # Python's own count leaves out the frames of an import.
        level, current = level + (not current.f_code.co_filename.startswith(_IMPORT)), current.f_back
    warnings.warn(f"secondorder: {message}", stacklevel=level + 1)
