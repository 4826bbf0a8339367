import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import secondorder as so

ROOT = Path(__file__).parents[1]


def test_build_info():
    info = so.build_info()
    assert torch.__version__.startswith(".".join(info["torch"].split(".")[:2]))
    assert info["vectors"] in ("avx512", "avx2", "baseline")
    assert info["threads"] == torch.get_num_threads()
    assert info["openmp"] is True
    assert info["compiler"]
    assert "cuda_architectures" in info


def test_one_version():
    """`secondorder.__version__` is the only one: the build reads it, and the changelog begins with it."""
    assert 'version = { attr = "secondorder.__version__" }' in (ROOT / "pyproject.toml").read_text()
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == so.__version__


def test_import_without_the_extension_says_what_to_do():
    script = "import sys; sys.modules['secondorder._C'] = None; import secondorder"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode != 0
    assert "its compiled extension is missing or does not fit this torch" in run.stderr
    assert "pip install ." in run.stderr


@pytest.mark.parametrize("vectors", ["baseline", "avx2"])
def test_the_narrower_vector_loops(vectors):
    """The loops that this machine's own choice hides, in a process that is made to use them."""
    families = [path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp") if '#include "kernels.h"' in path.read_text()]
    tests = [f"tests/ops/test_{family}.py" for family in sorted(families) if family != "kernels"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *tests],
        cwd=ROOT,
        env={**os.environ, "SECONDORDER_VECTORS": vectors},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    chosen = subprocess.run(
        [sys.executable, "-c", "import secondorder; print(secondorder.build_info()['vectors'])"],
        env={**os.environ, "SECONDORDER_VECTORS": vectors},
        capture_output=True,
        text=True,
        check=True,
    )
    assert chosen.stdout.strip() in (vectors, "baseline")  # baseline alone, off x86-64 and on very old machines
