"""bench.tools.gpu_report as far as it runs without a GPU: what it compares is equal, and the report has every number."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.tools import gpu_report


def test_what_is_compared_is_equal():
    for comparison in gpu_report.comparisons("cpu"):
        for actual, expected in zip(comparison.ours(), comparison.plain(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-4 * expected.abs().max().item())


def test_the_report_of_every_operator_at_every_precision(monkeypatch):
    monkeypatch.setattr(gpu_report, "BATCH", 10)
    called = []

    def clock(function):
        function()
        called.append(function)
        return 2.0

    def broken(function):
        raise RuntimeError("not on this machine\nand more of it")

    forms = {"eager": lambda f: f, "torch.compile": broken, "CUDA graph": lambda f: f}
    rows = gpu_report.measurements("cpu", forms, clock, lambda: (1e12, 1e13))
    assert len(called) == 2 * 3 * 4  # precisions, operators, forms that work
    assert {row["plain, torch.compile, ms"] for row in rows} == {"failed: not on this machine"}
    operators = {comparison.name: comparison for comparison in gpu_report.comparisons("cpu")}
    for row in rows:
        operator = operators[row["operator"]]
        assert row["of copy bandwidth"] == pytest.approx(operator.bytes / 2e-3 / 1e12)
        assert row["of matrix product"] == pytest.approx(operator.flops / 2e-3 / 1e13)
    steps = [{"step": "tests", "command": "pytest", "status": 0, "tail": ""}]
    report = {"GPU": "none", "torch": torch.__version__, "CUDA": None, "steps": steps, "rows": rows}
    page = gpu_report.markdown(json.loads(json.dumps(report)))
    assert page.count("| high |") == page.count("| highest |") == 3
    assert "- tests: exit status 0 (`pytest`)" in page
