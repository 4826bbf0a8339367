"""Every inner loop of the CPU operators uses vectors, of every width: g++ says so itself."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "csrc" / "cpu"
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-fopt-info-vec-optimized"]


@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="the widths are those of x86-64, by g++"
)
def test_loops_are_vectorized(tmp_path):
    """What g++ cannot vectorize under `omp simd` it compiles element by element, without a word, many times as slow."""
    if "clang" in subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout:
        pytest.skip("clang by the name of g++")
    command = ["g++", *FLAGS, "-c", str(SOURCES / "kernels.cpp"), "-o", str(tmp_path / "kernels.o")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    widths: dict[int, set[int]] = {}
    for line, width in re.findall(r"kernels\.inc:(\d+):\d+: optimized: loop vectorized using (\d+) byte vectors", told):
        widths.setdefault(int(line), set()).add(int(width))
    lines = (SOURCES / "kernels.inc").read_text().splitlines()
    loops = [number for number, line in enumerate(lines, 1) if line.startswith("#pragma omp simd")]
    assert len(loops) >= 10
    for loop in loops:  # the compiler names the loop's line, or one of its body's
        found = set().union(*(widths.get(line, set()) for line in range(loop + 1, loop + 4)))
        assert found >= {16, 32, 64}, f"kernels.inc:{loop}: {lines[loop].strip()} uses vectors of {sorted(found)} bytes"
