"""Numbers that are not finite, exceptions, threads, processes and kills, with every optimizer."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers.habits import batch, every, everything, network, step, train
from helpers.optimizers import ALL, FIXED, parameters
from helpers.training import assert_same
from torch import nn

import secondorder as so


def poison_input(model, x, y):
    x[2, 3] = float("nan")


def poison_gradient(model, x, y):
    def hook(gradient):
        handle.remove()
        return gradient.index_fill(0, torch.tensor([1]), float("inf"))

    handle = model[2].weight.register_hook(hook)


def huge_input(model, x, y):
    x.fill_(1e200)  # finite; its second moments are not


@every
@pytest.mark.parametrize("poison", [poison_input, poison_gradient, huge_input])
def test_nonfinite_is_raised_or_skipped_and_counted(name, poison):
    for how in ("error", "skip"):
        model = network()
        optimizer = ALL[name](model, nn.CrossEntropyLoss(), nonfinite=how)
        train(model, optimizer, range(2))
        x, y = batch(5)
        poison(model, x, y)
        before = everything(model, optimizer)
        try:
            step(model, optimizer, x, y)
        except so.NonFiniteError:
            assert how == "error"
            assert_same(everything(model, optimizer), before)
        else:
            if how == "skip" and optimizer.skipped_steps:
                assert_same(everything(model, optimizer), before)
                assert optimizer.skipped_steps == 1
            else:
                assert poison is huge_input  # whose direction may well be finite
        assert torch.isfinite(parameters(model)).all()
        for seed in range(3):
            step(model, optimizer, *batch(seed))
        assert torch.isfinite(parameters(model)).all()


@pytest.mark.parametrize("name", ["EACG", "KBFGS"])
def test_nonfinite_is_checked_at_construction(name):
    with pytest.raises(ValueError, match="expected nonfinite 'error' or 'skip', got 'ignore'"):
        FIXED[name](network(), nn.CrossEntropyLoss(), nonfinite="ignore")


@every
def test_an_exception_between_backward_and_step(name):
    criterion, models = nn.CrossEntropyLoss(), [network(), network()]
    optimizers = [ALL[name](model, criterion) for model in models]

    def fail():
        raise KeyboardInterrupt

    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(2))
        if model is models[0]:
            with pytest.raises(KeyboardInterrupt):
                step(model, optimizer, *batch(7), fail)
        train(model, optimizer, range(2, 4))
    assert_same(everything(models[0], optimizers[0]), everything(models[1], optimizers[1]))


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("KFAC")])  # its labels are of torch's one generator
def test_two_threads_train_as_one_after_the_other(name):
    def run(model, optimizer):
        for seed in range(10):
            step(model, optimizer, *batch(seed))

    pairs = []
    for parallel in (False, True):
        models = [network(), network()]
        threads = [threading.Thread(target=run, args=(m, ALL[name](m, nn.CrossEntropyLoss()))) for m in models]
        for thread in threads:
            thread.start()
            if not parallel:
                thread.join()
        for thread in threads:
            thread.join()
        pairs.append([parameters(model) for model in models])
    assert_same(pairs[0], pairs[1])


@every
def test_same_seed_same_bits(name):
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 129), nn.Tanh(), nn.Dropout(), nn.Linear(129, 3))
        optimizer = ALL[name](model, nn.CrossEntropyLoss())
        train(model, optimizer, range(5), m=300, dtype=torch.float32)
        runs.append(everything(model, optimizer))
    assert_same(*runs)


SAVES_FOREVER = """
import os, sys, torch
from torch import nn
import secondorder as so
model = nn.Sequential(nn.Linear(2000, 500), nn.Tanh(), nn.Linear(500, 3))
optimizer = so.LayerwiseNewton(model, nn.CrossEntropyLoss())
optimizer.criterion(model(torch.randn(8, 2000)), torch.randint(3, (8,))).backward()
optimizer.step()
path = sys.argv[1]
while True:
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path + ".new")
    os.replace(path + ".new", path)
    print("saved", flush=True)
"""


def test_a_kill_while_saving_leaves_a_loadable_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    process = subprocess.Popen(
        [sys.executable, "-c", SAVES_FOREVER, str(path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    try:
        assert process.stdout.readline() == b"saved\n"
        for attempt in range(20):  # stopped where it stands, it leaves what a kill there leaves
            time.sleep(0.003 * attempt)
            process.send_signal(signal.SIGSTOP)
            saved = torch.load(path, weights_only=True)
            assert saved["optimizer"]["state"][0]["factors"]["bias_hessian"].shape == (500, 500)
            process.send_signal(signal.SIGCONT)
    finally:
        process.kill()
        process.communicate()  # waits, and closes the pipe
    torch.load(path, weights_only=True)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
@every
def test_workers_of_a_data_loader_by_fork(name):
    def run(workers):
        model = network()
        optimizer = ALL[name](model, nn.CrossEntropyLoss())
        x, y = batch(m=40)
        context = "fork" if workers else None
        data = torch.utils.data.TensorDataset(x, y)
        for _ in range(2):
            for batch_x, batch_y in torch.utils.data.DataLoader(data, 8, num_workers=workers, multiprocessing_context=context):
                step(model, optimizer, batch_x, batch_y)
        return parameters(model)

    assert torch.equal(run(0), run(2))
