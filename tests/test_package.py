import importlib
import inspect
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import secondorder as so

ROOT = Path(__file__).parents[1]


PACKAGES = [
    "secondorder",
    *(m.name for m in pkgutil.walk_packages(so.__path__, "secondorder.") if m.ispkg and "._" not in m.name),
]


@pytest.mark.parametrize("name", PACKAGES)
def test_all_lists_every_public_name_and_no_other(name):
    module = importlib.import_module(name)
    listed = module.__all__
    assert len(set(listed)) == len(listed)
    assert all(not each.startswith("_") and hasattr(module, each) for each in listed)
    own = {
        key for key, value in vars(module).items()
        if not key.startswith("_") and getattr(value, "__module__", "").startswith("secondorder") and not inspect.ismodule(value)
    }  # fmt: skip
    assert own <= set(listed)


def test_a_source_distribution_has_all_sources_and_what_the_readme_links_to(tmp_path):
    """Whether it is made with the extension or without; the list is what setuptools packs."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path],
        cwd=ROOT, env={**os.environ, "SECONDORDER_EXTENSION": "0"}, check=True, capture_output=True,
    )  # fmt: skip
    packed = (tmp_path / "secondorder.egg-info" / "SOURCES.txt").read_text().splitlines()
    tracked = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    tracked |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text())
    assert len(links) > 20 and tracked | set(links) <= set(packed)


def test_architectures_are_those_that_nvcc_and_torch_know(monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setenv("SECONDORDER_EXTENSION", "0")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    build = runpy.run_path(str(ROOT / "setup.py"))
    assert build["architectures"]((13, 0), lambda _: True) == "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
    assert build["architectures"]((12, 10), lambda name: name != "12.0") == "8.0;8.6;8.9;9.0;10.0+PTX"
    assert build["architectures"]((12, 7), lambda _: True) == "8.0;8.6;8.9;9.0+PTX"
    with pytest.raises(SystemExit, match="need nvcc 12.1 or newer, got 11.8"):
        build["architectures"]((11, 8), lambda _: True)
    known = build["known_to"](cpp_extension)
    assert [known(name) for name in ("8.0", "9.0", "99.0")] == [True, True, False]
    assert "TORCH_CUDA_ARCH_LIST" not in os.environ


def test_build_info():
    info = so.build_info()
    if not info["extension"]:
        pytest.skip("there is no extension")
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


@pytest.mark.skipif(not so.build_info()["extension"], reason="there is no extension")
@pytest.mark.parametrize("vectors", ["baseline", "avx2"])
def test_the_narrower_vector_loops(vectors):
    """The loops that this machine's own choice hides, in a process that is made to use them."""
    if so.build_info()["vectors"] == vectors:
        pytest.skip("every other test runs these")
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
