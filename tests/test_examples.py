"""Every example runs as a user runs it, for a few steps."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDS = {"deepxde_poisson": "deepxde"}  # whose own warnings are not ours


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_ends_nearer_to_the_solution_than_zero_is(example):
    needed = NEEDS.get(example.stem)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    run = subprocess.run(
        [sys.executable, "-W", "default" if needed else "error", str(example), "--steps", "40"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    errors = [float(error) for error in re.findall(r"relative error of .+: (\S+)", run.stdout)]
    assert errors, run.stdout
    assert all(0 < error < 0.5 for error in errors)


def test_the_examples_are_those_of_the_design_page():
    block = (ROOT / "docs" / "design.md").read_text().partition("    examples/")[2].partition("\n    tests/")[0]
    assert sorted(re.findall(r"\w+\.py", block)) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))
