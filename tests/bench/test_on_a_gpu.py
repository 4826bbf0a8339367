"""bench.experiments.on_a_gpu as far as it runs without a GPU: small tasks, trained for moments."""

import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.experiments import on_a_gpu


@pytest.fixture(autouse=True)
def _small(monkeypatch, tmp_path):
    monkeypatch.setattr(on_a_gpu, "CONTEXT", 16)
    monkeypatch.setattr(on_a_gpu, "QUEUED", 2)
    monkeypatch.setattr(on_a_gpu, "REHEARSAL", 1)
    monkeypatch.setattr(on_a_gpu, "WIDTH", 12)
    tasks = {name: partial(task, batch=2) for name, task in on_a_gpu.TASKS.items()}
    monkeypatch.setattr(on_a_gpu, "TASKS", tasks)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    torch.manual_seed(0)
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        rows = torch.randint(10, (4, 3073), dtype=torch.uint8)
        (folder / f"{name}.bin").write_bytes(rows.numpy().tobytes())


@pytest.mark.parametrize("method", ["EigenAdam", "AdamW"])
@pytest.mark.parametrize("task", on_a_gpu.TASKS)
def test_a_run_is_measured(task, method, tmp_path):
    lr = 1e-3 if method == "AdamW" else None
    run = on_a_gpu.trained(task, method, lr, 0, 0.05, "cpu", tmp_path)
    assert run.steps >= 2
    assert run.seconds == sorted(run.seconds)
    assert run.milliseconds == pytest.approx(1e3 * run.seconds[-1] / run.steps)
    assert len(run.seconds) == len(run.train) == len(run.test) == len(run.score) >= 1
    assert all(map(math.isfinite, run.train))


def test_a_schedule_rises_and_ends_at_zero():
    factors = [on_a_gpu.factor(step, step / 999) for step in range(1000)]
    assert factors[0] == pytest.approx(0.01)
    assert max(factors) == pytest.approx(factors[99], rel=0.02)
    assert factors[-1] == pytest.approx(0, abs=1e-5)


def test_the_next_character_is_what_is_learned(tmp_path):
    """A model that is given the answer has no loss: targets are the inputs one place on."""
    task = on_a_gpu.characters("cpu", None, 0, batch=2)
    x, y = task.batch()
    assert x.shape == y.shape == (2, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_images_are_mirrored_and_shifted(tmp_path):
    task = on_a_gpu.resnet("cpu", tmp_path, 0, batch=2)
    data = on_a_gpu.cifar10(tmp_path)
    images = data.train_x.view(-1, 3, 32, 32)
    images = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    found = set()
    for _ in range(10):
        x, y = task.batch()
        assert x.shape == (2, 3, 32, 32)
        assert y.shape == (2,)
        for image, label in zip(x, y, strict=True):
            same = padded[data.train_y == label]
            found |= {
                (i, j, mirrored)
                for i in range(9)
                for j in range(9)
                for mirrored in (False, True)
                if ((image.flip(2) if mirrored else image) - same[:, :, i : i + 32, j : j + 32]).abs().amax((1, 2, 3)).min()
                < 1e-5
            }
    tops, lefts, mirrored = (set(each) for each in zip(*found, strict=True))
    assert min(len(tops), len(lefts)) >= 5, found
    assert mirrored == {False, True}


def test_a_task_by_itself_leaves_the_others_stored_runs(monkeypatch, tmp_path):
    out = tmp_path / "runs.json"
    out.write_text(json.dumps({"runs": [{"task": "resnet", "lr": 1}, {"task": "characters", "lr": 2}]}))
    monkeypatch.setattr(on_a_gpu, "METHODS", {"characters": {"AdamW": on_a_gpu.Method(on_a_gpu.adamw, (1e-3,))}})
    monkeypatch.setattr(sys, "argv", ["", "--only", "characters", "--device", "cpu", "--seconds", "0.05", "--out", str(out)])
    on_a_gpu.main()
    report = json.loads(out.read_text())
    assert [(run["task"], run["lr"]) for run in report["runs"]] == [("resnet", 1), ("characters", 1e-3)]
    assert "characters to train on" in report["runs"][1]["data"]
    assert report["torch"] == torch.__version__


@pytest.mark.parametrize("captured", [False, True])
def test_the_stored_runs_are_complete(captured):
    stored = json.loads((on_a_gpu.RESULTS / f"gpu_training{'_captured' if captured else ''}.json").read_text())
    wanted = {
        (task, name, lr)
        for task, methods in on_a_gpu.METHODS.items()
        for name, each in methods.items()
        for lr in each.rates or (None,)
        if each.captured == captured
    }
    if captured:  # of the transformer alone, beside the same steps without a graph
        wanted = {run for run in wanted if run[0] == "characters"} | {("characters", "EigenAdam with the schedule", 1.0)}
    wanted -= {("resnet", "SOAP", 3e-3)}  # the time was up
    assert {(run["task"], run["method"], run["lr"]) for run in stored["runs"]} == wanted
    assert all(run["seconds"][-1] >= stored["seconds"] for run in stored["runs"])
