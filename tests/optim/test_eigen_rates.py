"""EigenAdam's learning rates: groups, schedulers, and rates of other optimizers."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.eigen import batch, network, train, values
from torch.optim import lr_scheduler

import secondorder as so


def test_values_of_groups_are_read_at_each_step():
    models = [network(), network()]
    optimizers = [so.EigenAdam(models[0]), so.EigenAdam(models[1], 0.5, weight_decay=0.2)]
    for group in optimizers[0].param_groups:
        group.update(lr=0.5, weight_decay=0.2)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(4))
    assert torch.equal(values(models[0]), values(models[1]))


@pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingLR", "OneCycleLR", "ReduceLROnPlateau", "LambdaLR"])
def test_schedulers(name):
    options = {
        "StepLR": {"step_size": 2}, "CosineAnnealingLR": {"T_max": 5}, "ReduceLROnPlateau": {},
        "OneCycleLR": {"max_lr": 1.0, "total_steps": 9, "cycle_momentum": False}, "LambdaLR": {"lr_lambda": lambda t: 0.5**t},
    }  # fmt: skip
    model = network()
    optimizer = so.EigenAdam(model)
    scheduler = getattr(lr_scheduler, name)(optimizer, **options[name])
    for seed in range(5):
        (loss,) = train(model, optimizer, [seed])
        scheduler.step(*[loss] if name == "ReduceLROnPlateau" else [])
    assert torch.isfinite(values(model)).all()


def test_a_scheduler_sets_the_step():
    model = network()
    optimizer = so.EigenAdam(model)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: 0.0 if t == 2 else 1.0)
    for t in range(4):
        before = values(model)
        train(model, optimizer, [t])
        assert torch.equal(values(model), before) == (t == 2)
        scheduler.step()


def test_where_the_learning_rate_is_zero_there_is_no_step():
    """Slopes along steps that are not made lengthen no step."""
    models = [network(), network()]
    optimizers = [so.EigenAdam(model) for model in models]
    for t in range(30):
        if t in (0, 9):
            optimizers[0].param_groups[0]["lr"] = 0.0
            train(models[0], optimizers[0], range(40))
            optimizers[0].param_groups[0]["lr"] = 1.0
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, [t])
    assert torch.equal(values(models[0]), values(models[1]))
    assert optimizers[0].metrics()["length"] == optimizers[1].metrics()["length"]


def test_a_group_whose_learning_rate_is_zero_is_frozen():
    models = [network(), network()]
    optimizers = [so.EigenAdam([{"params": m[:2].parameters()}, {"params": m[2:].parameters()}], model=m) for m in models]
    optimizers[0].param_groups[0]["lr"] = 0.0
    models[1][0].requires_grad_(False)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(30))
    assert torch.equal(values(models[0]), values(models[1]))
    optimizers[0].param_groups[0]["lr"] = 1.0
    models[1][0].requires_grad_(True)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(30, 50))
    assert torch.equal(values(models[0]), values(models[1]))


def test_groups_must_agree_where_one_number_serves_all():
    model = network()
    with pytest.raises(ValueError, match="expected betas to be two numbers"):
        so.EigenAdam([{"params": model.parameters(), "betas": (5.0, 5.0)}])
    with pytest.raises(ValueError, match="expected lr >= 0, got -5"):
        so.EigenAdam([{"params": model.parameters(), "lr": -5}])
    with pytest.raises(ValueError, match="more than one parameter group"):
        so.EigenAdam([{"params": model.parameters()}, {"params": [model[0].weight]}])
    for name, other in (("betas", (0.5, 0.5)), ("eps", 1e-3)):
        optimizer = so.EigenAdam([{"params": model[0].parameters()}, {"params": model[2].parameters(), name: other}], model=model)
        with pytest.raises(
            ValueError, match=rf"expected {name} to be the same in all param_groups, got .* and {re.escape(repr(other))}"
        ):
            train(model, optimizer, [0])


def test_one_cycle_with_the_rate_of_another_optimizer_is_warned_of():
    model = network()
    optimizer = so.EigenAdam(model)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=10)
    x, y = batch(0, 12)
    F.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match="max_lr=0.01 multiplies the step that EigenAdam finds .* give max_lr=1.0"):
        optimizer.step()
    scheduler.step()
    optimizer.step()  # says it once


def by_group(model):
    return so.EigenAdam([{"params": layer.parameters(), "lr": 1e-3} for layer in model], model=model), None


def by_hand(model):
    optimizer = so.EigenAdam(model)
    optimizer.param_groups[0]["lr"] = 1e-3
    return optimizer, None


def cyclic(model):
    optimizer = so.EigenAdam(model)
    return optimizer, lr_scheduler.CyclicLR(optimizer, 1e-4, 1e-3)


def noam(model):
    optimizer = so.EigenAdam(model)
    return optimizer, lr_scheduler.LambdaLR(optimizer, lambda t: 512**-0.5 * min((t + 1) ** -0.5, (t + 1) * 400**-1.5))


def warm_up(model):
    optimizer = so.EigenAdam(model)
    return optimizer, lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=4000)


def one_small_group(model):
    return so.EigenAdam([{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2].parameters()}], model=model), None


@pytest.mark.parametrize(
    ("made", "told"),
    [(by_group, True), (by_hand, True), (cyclic, True), (noam, True), (warm_up, False), (one_small_group, False)],
)
def test_the_lr_of_another_optimizer_is_told_of_after_100_steps(made, told):
    model = network()
    optimizer, scheduler = made(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(110):
            train(model, optimizer, [seed])
            if scheduler is not None:
                scheduler.step()
    assert [("multiplies the step that EigenAdam finds" in str(each.message)) for each in caught] == [True] * told
