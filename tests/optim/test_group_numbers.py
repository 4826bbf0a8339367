"""Numbers of param_groups that are changed to bad ones after construction: an error, and nothing has changed."""

import math

import pytest
import torch
from helpers.kinds import NAMES, made
from helpers.training import assert_same, snapshot

BAD = {
    "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "negative": -1.0, "text": "fast", "text of a number": "0.1",
    "none": None, "two": torch.tensor([0.1, 0.1]), "nan in a tensor": torch.tensor(math.nan),
    "inf in a tensor": torch.tensor(math.inf), "complex": 1j, "list": [0.1],
}  # fmt: skip
NONE_MEANS_SOMETHING = ("max_step", "damping_a", "damping_g")
NUMBERS = (
    "lr", "alpha", "momentum", "weight_decay", "factor_decay", "eps", "damping", "damping_a", "damping_g", "mu1", "decay",
    "max_step",
)  # fmt: skip
CASES = [(name, key) for name in NAMES for key in NUMBERS if key in made(name)[1].param_groups[0]]


def assert_refused(name, key, values, match):
    """After a step, which goes on once the value is again what it was."""
    model, optimizer, step = made(name)
    step()
    good, before = optimizer.param_groups[0][key], snapshot(model, optimizer)
    for value in values:
        optimizer.param_groups[0][key] = value
        with pytest.raises((ValueError, TypeError), match=match):
            step()
        optimizer.param_groups[0][key] = good
        assert_same(snapshot(model, optimizer), before)
    step()


@pytest.mark.parametrize(("name", "key"), CASES)
def test_a_number_that_is_none_or_out_of_range(name, key):
    bad = dict(BAD)
    if key in NONE_MEANS_SOMETHING:
        del bad["none"]
    if key == "max_step":
        del bad["inf"], bad["inf in a tensor"]
    assert_refused(name, key, bad.values(), rf"{name}\.step\(\): expected {key} ")


@pytest.mark.parametrize("name", [name for name in NAMES if "maximize" in made(name)[1].param_groups[0]])
def test_a_flag_that_is_none(name):
    for key in ("maximize", "decoupled_weight_decay"):
        if key in made(name)[1].param_groups[0]:
            assert_refused(name, key, ["no", 0, None, math.nan], rf"{name}\.step\(\): expected {key} to be True or False, got ")


def test_betas_that_are_no_decays():
    bad = [
        (math.nan, 0.95), (0.9, math.nan), (math.inf, 0.95), (0.9, math.inf), (-0.1, 0.95), (0.9, 1.0), (0.9,), (0.9, 0.95, 0.1),
        ("0.9", 0.95), (0.9, None), (torch.tensor([0.9, 0.9]), 0.95), "ab", None, 0.9,
    ]  # fmt: skip
    match = r"EigenAdam\.step\(\): expected betas to be two numbers, in \[0, 1\) and \(0, 1\)"
    assert_refused("EigenAdam", "betas", bad, match)


@pytest.mark.parametrize("lr", [math.nan, math.inf, -0.1])
@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_that_gives_one(name, lr):
    model, optimizer, step = made(name)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch == 0 else lr / optimizer.defaults["lr"])
    step()
    scheduler.step()
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=rf"{name}\.step\(\): expected lr "):
        step()
    assert_same(snapshot(model, optimizer)[0], before[0])
