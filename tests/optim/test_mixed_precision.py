"""GradScaler and autocast with every optimizer."""

import pytest
import torch
from helpers.habits import batch, every, everything, network, one_call, train
from helpers.kinds import NAMES, QUASI_NEWTON
from helpers.optimizers import ALL, FIXED, OTHERS, parameters
from helpers.training import assert_same
from torch import nn
from torch.utils._pytree import tree_leaves

import secondorder as so
from secondorder._tensors import without_autocast
from secondorder.optim._amp import outside_autocast


@one_call
@pytest.mark.parametrize("clipped", [False, True])
def test_grad_scaler_changes_nothing(name, clipped):
    criterion, models = nn.CrossEntropyLoss(), [network(), network()]
    optimizers = [ALL[name](model, criterion) for model in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    if clipped:
        optimizers[1].grad_scaler = scaler
    for seed in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            x, y = batch(seed)
            loss = criterion(model(x), y)
            if optimizer is optimizers[0]:
                loss.backward()
            else:
                scaler.scale(loss).backward()
                if clipped:
                    scaler.unscale_(optimizer)
            if clipped:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if optimizer is optimizers[0]:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
    assert_same(everything(models[0], optimizers[0]), everything(models[1], optimizers[1]))


@one_call
def test_grad_scaler_skips_a_step_with_inf(name):
    model = network()
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    train(model, optimizer, range(2))
    before = everything(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.zero_grad()
    x, y = batch()
    scaler.scale(optimizer.criterion(model(x), y)).backward()
    model[2].weight.grad[1, 2] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert_same(everything(model, optimizer), before)
    assert optimizer.skipped_steps == 1
    assert scaler.get_scale() == 4.0
    train(model, optimizer, [3])
    assert not torch.equal(parameters(model), before[0])


def test_what_grad_scaler_cannot_do_is_refused():
    model, scaler, (x, y) = network(), torch.amp.GradScaler("cpu"), batch()
    optimizer = so.LayerwiseNewton(model, nn.CrossEntropyLoss())
    scaler.scale(optimizer.criterion(model(x), y)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"optimizer.grad_scaler = scaler"):
        scaler.step(optimizer)
    optimizer, scaler = so.KBFGS(model, nn.CrossEntropyLoss()), torch.amp.GradScaler("cpu")
    scaler.scale(optimizer.criterion(model(x), y)).backward()
    with pytest.raises(RuntimeError, match="GradScaler knows no closure"):
        scaler.step(optimizer, lambda: None)


@every
def test_autocast_trains(name):
    model = network(torch.float32)
    optimizer = ALL[name](model, nn.CrossEntropyLoss(), **({"lr": 0.01} if name in FIXED else {}))
    x, y = batch(m=40, dtype=torch.float32)

    def closure():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = optimizer.criterion(model(x), y)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(15)]
    assert losses[-1] < losses[0]
    assert {v.dtype for v in tree_leaves(dict(optimizer.state)) if isinstance(v, torch.Tensor)} == {torch.float32}


@pytest.mark.parametrize("name", NAMES)
def test_a_step_within_autocast_is_that_outside(name):
    """As of torch's own optimizers. A closure is called as within it, and sees the weights that have moved."""
    found = []
    for ambient in (False, True):
        torch.manual_seed(0)
        model = network(torch.float32)
        first = model.parameters() if name == "LevenbergMarquardt" else model
        criterion = nn.MSELoss() if name == "LevenbergMarquardt" else nn.CrossEntropyLoss()
        optimizer = getattr(so, name)(first, *([] if name in OTHERS else [criterion]))
        dtypes, losses = set(), []
        for seed in range(6):
            x, y = batch(seed, m=40, dtype=torch.float32)
            y = nn.functional.one_hot(y, 3).float() if name == "LevenbergMarquardt" else y

            def closure(optimizer=optimizer, model=model, criterion=criterion, x=x, y=y, dtypes=dtypes):
                optimizer.zero_grad()
                dtypes.add(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
                with torch.autocast("cpu", enabled=False):
                    loss = criterion(model(x), y)
                    loss.backward()
                return loss

            with torch.autocast("cpu", torch.bfloat16, enabled=ambient):
                if name in ("LevenbergMarquardt", *QUASI_NEWTON):
                    losses.append(float(optimizer.step(closure).detach()))
                else:
                    losses.append(float(closure().detach()))
                    optimizer.step()
        assert dtypes == {ambient and torch.bfloat16}
        found.append((parameters(model), losses))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@every
def test_a_loop_within_one_autocast_sees_the_weights_that_have_moved(name):
    """Autocast keeps rounded copies of weights until its outermost end."""
    torch.manual_seed(0)
    model = network(torch.float32)
    optimizer = ALL[name](model, nn.CrossEntropyLoss(), **({"lr": 0.01} if name in FIXED else {}))
    x, y = batch(m=40, dtype=torch.float32)

    def closure():
        optimizer.zero_grad()
        loss = optimizer.criterion(model(x), y)
        loss.backward()
        return loss

    with torch.autocast("cpu", torch.bfloat16):
        losses = [float(optimizer.step(closure).detach()) for _ in range(15)]
    assert losses[-1] < losses[0]


def test_torch_is_not_asked_about_autocast_on_a_device_that_has_none():
    """Without an answer torch raises; the step and the curvature then go on as without autocast."""

    class Plain(torch.optim.SGD):
        step = outside_autocast(torch.optim.SGD.step)

    p = nn.Parameter(torch.ones(3, device="meta"))
    p.grad = torch.ones_like(p)
    called = []
    with torch.autocast("cpu", torch.bfloat16):
        Plain([p], lr=0.1).step(lambda: called.append(torch.is_autocast_enabled("cpu")))
    assert called == [True]
    with without_autocast(p.device):
        assert (p + p).dtype == torch.float32


def test_a_failed_step_under_grad_scaler_can_be_tried_again():
    model, (x, y) = network(), batch()
    optimizer, scaler = so.EACG(model, nn.CrossEntropyLoss()), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(optimizer.criterion(model(x), y)).backward()
    gradient = model[0].weight.grad.clone()
    losses, optimizer._tape._log.losses = optimizer._tape._log.losses, []
    with pytest.raises(RuntimeError, match="no call of the criterion"):
        scaler.step(optimizer)
    assert torch.equal(model[0].weight.grad, gradient)
    optimizer._tape._log.losses = losses
