"""The package without its compiled extension, where plain PyTorch stands in for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import kinds

import secondorder as so
from secondorder import _extension

ROOT = Path(__file__).parents[1]


def run(*arguments, **variables):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), **variables}
    return subprocess.run([sys.executable, "-W", "error", *arguments], env=environment, capture_output=True, text=True, cwd=ROOT)


def test_training_without_the_extension_is_the_same(tmp_path):
    """In float64, where rounding does not hide what differs; and under a dispatch mode."""
    path = tmp_path / "trained.pt"
    done = run(kinds.__file__, str(path), SECONDORDER_PURE_PYTHON="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False"]
    for name, runs in torch.load(path).items():
        expected = kinds.trained_to_compare(name)
        for plain in runs:
            torch.testing.assert_close(plain, expected, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


def test_the_switch_has_two_values(monkeypatch):
    monkeypatch.setenv("SECONDORDER_PURE_PYTHON", "1")
    assert _extension._load() is None
    monkeypatch.setenv("SECONDORDER_PURE_PYTHON", "yes")
    with pytest.raises(ImportError, match="expected SECONDORDER_PURE_PYTHON to be 0 or 1, got 'yes'"):
        _extension._load()


MISSING = "import sys; sys.modules['secondorder._C'] = None\n"


def test_a_missing_extension_is_warned_of_once_at_the_import():
    caught = (
        "import warnings\nwith warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n    import secondorder\n"
        "import torch\nsecondorder.ops.eacg_solve(torch.eye(2), torch.ones(3), torch.ones(2, 3), None, 0.1, 5, 0.0, False)\n"
        "print(len(caught), caught[0].filename, caught[0].message)"
    )
    done = run("-c", MISSING + caught, SECONDORDER_PURE_PYTHON="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 <string> secondorder: its compiled extension is missing or does not fit this torch")
    assert "several times as slow" in done.stdout
    assert "SECONDORDER_PURE_PYTHON=1" in done.stdout
    assert f"{ROOT} is the source folder, and hides a package that is installed" in done.stdout


@pytest.mark.skipif(_extension.compiled is None, reason="there is no extension")
def test_an_extension_for_another_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "1.0.0")
    with pytest.raises(ImportError, match=r"its extension was compiled against torch \S+, this is 1\.0\.0.*Install it anew"):
        _extension._load()


# --- what an installation says ------------------------------------------------------------------------------------------------


def test_setup_without_the_extension_needs_no_compiler_and_no_torch():
    hidden = "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '-q', '--version']; exec(open('setup.py').read())"
    done = run("-W", "default", "-c", hidden, SECONDORDER_EXTENSION="0")
    assert done.returncode == 0, done.stderr
    assert so.__version__ in done.stdout
    assert "expected SECONDORDER_EXTENSION to be one of 1, 0, got 'no'" in run("setup.py", SECONDORDER_EXTENSION="no").stderr


def test_setup_says_at_once_what_else_there_is():
    windows = "import setuptools, sys; sys.platform = 'win32'; sys.argv = ['setup.py', '-q', '--version']; "
    done = run("-W", "default", "-c", windows + "exec(open('setup.py').read())")
    assert done.returncode != 0
    assert "cannot be compiled on Windows. To install without the compiled extension, set SECONDORDER_EXTENSION=0" in done.stderr


def broken_project(folder, suffix):
    """The package with one source that no compiler takes."""
    (folder / "csrc").mkdir()
    (folder / "csrc" / f"broken.{suffix}").write_text("#error broken\n")
    (folder / "setup.py").write_text((ROOT / "setup.py").read_text())
    (folder / "pyproject.toml").write_text("[project]\nname = 'broken'\nversion = '0'\n[tool.setuptools]\npackages = []\n")


def test_setup_names_the_way_without_a_compiler_where_compiling_fails(tmp_path):
    broken_project(tmp_path, "cpp")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path, env={**os.environ, "SECONDORDER_CUDA": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "compiling its extension failed" in done.stderr
    assert "set SECONDORDER_EXTENSION=0 and repeat the command" in done.stderr
    assert "SECONDORDER_CUDA" not in done.stderr


def test_setup_names_the_way_without_cuda_where_the_toolkit_is_of_another_version(tmp_path):
    """A torch of CUDA 12.4, as its version says, beside a toolkit of 13.0, as its nvcc says."""
    broken_project(tmp_path, "cu")
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.48\n")
    nvcc.chmod(0o755)
    build = (
        "import os, sys, torch; from torch.utils import cpp_extension; torch.version.cuda = '12.4'; "
        "cpp_extension.CUDA_HOME = os.environ['CUDA_HOME']; "  # which a torch for the CPU does not read
        "__file__ = 'setup.py'; sys.argv = ['setup.py', '-q', 'build_ext', '--inplace']; exec(open('setup.py').read())"
    )
    done = subprocess.run(
        [sys.executable, "-c", build],
        cwd=tmp_path,
        env={**os.environ, "SECONDORDER_CUDA": "1", "CUDA_HOME": str(tmp_path / "toolkit")},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "The detected CUDA version" in done.stderr
    assert "To compile it for the CPU alone, set SECONDORDER_CUDA=0 and repeat the command. To install without" in done.stderr
