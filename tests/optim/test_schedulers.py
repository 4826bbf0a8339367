"""Learning rates and every scheduler of torch, with every optimizer."""

import pytest
import torch
from helpers.habits import batch, fixed, network, step, train
from helpers.optimizers import ALL, FIXED, OTHERS, parameters
from torch import nn
from torch.optim import lr_scheduler

import secondorder as so

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=6),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)]),
}  # fmt: skip


def test_all_of_torchs_schedulers_are_here():
    names = {n for n, c in vars(lr_scheduler).items() if isinstance(c, type) and issubclass(c, lr_scheduler.LRScheduler)}
    assert names - {"LRScheduler", "_LRScheduler", "SWALR"} == SCHEDULERS.keys()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@fixed
def test_every_scheduler_sets_the_step(name, scheduler):
    model = network()
    optimizer = FIXED[name](model, nn.CrossEntropyLoss(), **({} if name.startswith("KBFGS") else {"factor_decay": 0.0}))
    sgd = torch.optim.SGD(network().parameters(), lr=0.1, momentum=optimizer.param_groups[0]["momentum"])
    schedules = [SCHEDULERS[scheduler](o) for o in (optimizer, sgd)]
    for seed in range(5):
        step(model, optimizer, *batch(seed))
        sgd.step()
        for schedule in schedules:
            schedule.step(*[1.0] if scheduler == "ReduceLROnPlateau" else [])
        assert optimizer.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]
        assert optimizer.param_groups[0]["momentum"] == sgd.param_groups[0]["momentum"]
    optimizer.param_groups[0]["lr"] = 0.0
    before = parameters(model)
    step(model, optimizer, *batch(9))
    assert torch.equal(parameters(model), before)


found = pytest.mark.parametrize("name", [name for name in ALL if name not in FIXED])  # those that find their own step


@found
@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name not in ("CyclicLR", "OneCycleLR")])
def test_every_scheduler_multiplies_the_step_that_is_found(name, scheduler):
    models = [network(), network()]
    scheduled, by_hand = (ALL[name](model, nn.CrossEntropyLoss()) for model in models)
    sgd = torch.optim.SGD(network().parameters(), lr=1.0)
    schedules = [SCHEDULERS[scheduler](o) for o in (scheduled, sgd)]
    for seed in range(4):
        if name != "KFAC" or seed == 0:  # whose labels are drawn anew
            by_hand.param_groups[0]["lr"] = sgd.param_groups[0]["lr"]
            assert train(models[0], scheduled, [seed]) == train(models[1], by_hand, [seed])
        sgd.step()
        for schedule in schedules:
            schedule.step(*[1.0] if scheduler == "ReduceLROnPlateau" else [])
        assert scheduled.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]
    assert torch.equal(parameters(models[0]), parameters(models[1]))


@found
def test_the_learning_rate_multiplies_the_first_step_exactly(name):
    steps = {}
    for lr in (1.0, 0.25, 0.0):
        model = network()
        before = parameters(model)
        damping = {"tau": 10.0} if name == "KFAC" else {}  # so large that the whole step is accepted, too
        optimizer = ALL[name](model, nn.CrossEntropyLoss(), lr=lr, **damping)
        train(model, optimizer, [0])
        steps[lr] = parameters(model) - before
    assert steps[1.0].abs().max() > 0
    torch.testing.assert_close(steps[0.25], 0.25 * steps[1.0])
    assert steps[0.0].abs().max() == 0


@found
@pytest.mark.parametrize("lr", [2.0, -0.1, float("nan"), None])
def test_a_learning_rate_that_cannot_multiply_a_step_is_refused(name, lr):
    model = network()
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    optimizer.param_groups[0]["lr"] = lr
    before = parameters(model)
    for refuse in (lambda: train(model, optimizer, [0]), lambda: ALL[name](network(), nn.CrossEntropyLoss(), lr=lr)):
        with pytest.raises((ValueError, TypeError), match=r"expected lr (in \[0, 2\), since it multiplies|to be a number)"):
            refuse()
    assert torch.equal(parameters(model), before)


@pytest.mark.parametrize("name", [name for name in ALL if name not in FIXED])
def test_the_learning_rate_of_another_optimizer_is_warned_of(name):
    with pytest.warns(UserWarning, match=f"{name}: lr=0.001 multiplies the step that .* by itself, .* 1,000 times shorter"):
        ALL[name](network(), nn.CrossEntropyLoss(), lr=1e-3)
    ALL[name](network(), nn.CrossEntropyLoss(), lr=0.0)
    ALL[name](network(), nn.CrossEntropyLoss(), lr=0.02)


@pytest.mark.parametrize("name", [name for name in so.optim.__all__ if name not in FIXED and name not in OTHERS])
def test_one_learning_rate_multiplies_one_step(name):
    model = network()
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    weights = [model[0].weight, model[2].weight]
    optimizer.param_groups[0]["params"] = [p for p in model.parameters() if all(p is not w for w in weights)]
    optimizer.add_param_group({"params": weights, "lr": 0.5})
    before = parameters(model)
    with pytest.raises(ValueError, match="expected lr to be the same in all param_groups"):
        train(model, optimizer, [0])
    assert torch.equal(parameters(model), before)


def test_a_step_of_zero_keeps_the_previous_step():
    model = network()
    optimizer = so.LayerwiseNewton(model, nn.CrossEntropyLoss())
    train(model, optimizer, range(3))
    previous = optimizer.state[model[0].weight]["momentum"].clone()
    assert previous.abs().max() > 0
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, [3])
    assert torch.equal(optimizer.state[model[0].weight]["momentum"], previous)
