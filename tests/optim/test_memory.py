"""What a step of EACG holds beyond a step of SGD."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
import secondorder as so
from bench.micro.memory import peak


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.skipif(not so.build_info()["extension"], reason="plain PyTorch needs more")
def test_eacg_holds_no_more_than_bias_hessians_and_vectors():
    sizes, batch = [40000, 512, 256, 128, 10], 50
    megabyte = 2**20 / 4
    weights = sum(n * k for n, k in zip(sizes, sizes[1:])) / megabyte  # 79 MB
    plain, momentum = peak("SGD", sizes, batch), peak("SGD, momentum", sizes, batch)
    assert momentum - plain > 0.9 * weights  # the measurement sees a buffer of the weights' size
    # H before and after the step, and the operands of one recursion step in the kernel's layout.
    hessians = sum(k * k for k in sizes[1:]) / megabyte
    operands = (512 * batch + 512 * 256 + 256 * 256) / megabyte
    eacg = peak("EACG, momentum=0", sizes, batch)
    assert eacg - plain < 2 * hessians + operands + 12  # code that is loaded, threads' stacks and vectors
    assert eacg < momentum - 0.7 * weights
