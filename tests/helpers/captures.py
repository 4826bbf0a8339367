"""What looks to Python like the capture of a CUDA graph, without a GPU."""

from contextlib import contextmanager

import pytest
import torch


@contextmanager
def capturing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield
