"""bench.tools.gpu_report as far as it runs without a GPU: what it compares is equal, and the report has every number."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.tools import gpu_report, gpu_tables, gpu_timings


def test_what_is_compared_is_equal():
    for comparison in gpu_timings.comparisons("cpu"):
        for actual, expected in zip(comparison.ours(), comparison.plain(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-4 * expected.abs().max().item())


def test_the_report_of_every_operator_at_every_precision(monkeypatch):
    monkeypatch.setattr(gpu_timings, "BATCH", 10)
    called = []

    def clock(function):
        function()
        called.append(function)
        return 2.0

    def broken(function):
        raise RuntimeError("not on this machine\nand more of it")

    forms = {"eager": lambda f: f, "torch.compile": broken, "CUDA graph": lambda f: f}
    rows = list(gpu_timings.operators("cpu", forms, clock, lambda: (1e12, 1e13)))
    assert len(called) == 2 * 3 * 4  # precisions, operators, forms that work
    assert {row["plain, torch.compile, ms"] for row in rows} == {"failed: not on this machine"}
    operators = {comparison.name: comparison for comparison in gpu_timings.comparisons("cpu")}
    for row in rows:
        operator = operators[row["operator"]]
        assert row["of copy bandwidth"] == pytest.approx(operator.bytes / 2e-3 / 1e12)
        assert row["of matrix product"] == pytest.approx(operator.flops / 2e-3 / 1e13)
    steps = [{"step": "tests", "command": "pytest", "status": 0, "tail": ""}]
    report = {
        "GPU": "none",
        "torch": torch.__version__,
        "driver": "none",
        "CUDA": None,
        "steps": steps,
        "rows": {"operators": rows},
    }
    page = gpu_report.markdown(json.loads(json.dumps(report)))
    assert page.count("| high |") == page.count("| highest |") == 3
    assert "- tests: exit status 0 (`pytest`)" in page


def test_the_recursion_and_the_steps_have_rows_of_their_own():
    rows = list(gpu_timings.recursion("cpu", ((3, 5, 7),), lambda function: float(function() is not None)))
    assert [row["float32 matmul precision"] for row in rows] == ["highest", "high"]
    assert all(row["secondorder, ms"] == row["cuBLAS and elementwise, ms"] == 1.0 for row in rows)
    rows = list(gpu_timings.training("cpu", {"6-5-3": 8}))
    assert [row["optimizer"] for row in rows] == list(gpu_timings.OPTIMIZERS)
    for row in rows:
        assert "failed" not in row
        assert row["mean ms, steps queued"] > 0


def test_what_fails_to_train_does_not_cost_the_rest(monkeypatch):
    def broken(model, criterion):
        raise ValueError("no such optimizer")

    monkeypatch.setattr(gpu_timings, "OPTIMIZERS", {"broken": (broken, False), "SGD": gpu_timings.OPTIMIZERS["EACG"]})
    failed, fine = gpu_timings.training("cpu", {"6-5-3": 8})
    assert failed["failed"] == "ValueError: no such optimizer"
    assert "failed" not in fine


def test_a_step_is_stopped_at_its_limit():
    slow = "import time; print('begun', flush=True); time.sleep(60)"
    step = gpu_report.run("slow", [sys.executable, "-c", slow], 5)
    assert step["status"] == "stopped after 5 s"
    assert step["tail"] == "begun\n"
    assert gpu_report.run("fails", [sys.executable, "-c", "raise SystemExit(3)"], 60)["status"] == 3


def test_the_sanitizers_run_no_test_that_captures():
    """They have torch's caching allocator switched off, without which nothing can be captured."""
    tests = (Path(__file__).parents[1] / "test_gpu.py").read_text().split("\ndef ")
    capturing = [source.split("(")[0] for source in tests if "CUDAGraph()" in source]
    assert len(capturing) >= 4
    assert all(any(word in name for word in gpu_report.UNSANITIZED) for name in capturing)


def test_the_report_is_written_as_far_as_it_has_come(tmp_path):
    report = {"GPU": "none", "driver": "none", "torch": "none", "CUDA": None, "steps": []}
    gpu_report.write(report, tmp_path)
    (tmp_path / "recursion.json").write_text('[{"k": 3, "secondorder, ms": 0.5}]')
    report["steps"].append({"step": "recursion", "command": "python", "status": "stopped after 900 s", "tail": ""})
    gpu_report.write(report, tmp_path)
    page = (tmp_path / "REPORT.md").read_text()
    assert "- recursion: exit status stopped after 900 s (`python`)" in page
    assert "| 3 | 0.500 |" in page
    assert json.loads((tmp_path / "REPORT.json").read_text())["rows"] == {"recursion": [{"k": 3, "secondorder, ms": 0.5}]}


def test_the_page_has_the_tables_of_the_stored_result():
    page = gpu_tables.PAGE.read_text()
    assert gpu_tables.placed(page) == page
