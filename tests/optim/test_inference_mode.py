"""What is done in torch.inference_mode: an optimizer goes on afterwards as if it had been done elsewhere."""

import copy

import pytest
import torch
from helpers.kinds import NAMES, QUASI_NEWTON, made
from helpers.training import assert_same, snapshot


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [t for value in values for t in tensors(value)]


def went_on(model, optimizer, step):
    """Everything after two more steps, none of which has met an inference tensor."""
    torch.manual_seed(1)  # for labels that KFAC draws
    step()
    step()
    found = snapshot(model, optimizer)
    assert not any(t.is_inference() for t in tensors(optimizer.state_dict()))
    return found


def with_a_step(name):
    trained = made(name)
    torch.manual_seed(2)
    trained[2]()
    return trained


@pytest.mark.parametrize("saved_in", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_is_loaded_there_goes_on(name, saved_in):
    model, optimizer, step = with_a_step(name)
    with torch.inference_mode(saved_in):
        state = copy.deepcopy(optimizer.state_dict())
    with torch.inference_mode():
        optimizer.load_state_dict(state)
    assert_same(went_on(model, optimizer, step), went_on(*with_a_step(name)))


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_inference_tensors_goes_on(name):
    model, optimizer, step = with_a_step(name)
    with torch.inference_mode():
        state = copy.deepcopy(optimizer.state_dict())
    assert any(t.is_inference() for t in tensors(state))
    optimizer.load_state_dict(state)
    assert_same(went_on(model, optimizer, step), went_on(*with_a_step(name)))


@pytest.mark.parametrize("name", NAMES)
def test_a_first_step_there_is_one_elsewhere(name):
    """Also with a closure, which is called outside of inference mode."""
    model, optimizer, step = made(name)
    torch.manual_seed(2)
    if name in ("LevenbergMarquardt", *QUASI_NEWTON):
        with torch.inference_mode():
            step()
    else:
        whole = optimizer.step

        def there():
            with torch.inference_mode():
                whole()

        optimizer.step = there
        step()
        del optimizer.step
    assert_same(went_on(model, optimizer, step), went_on(*with_a_step(name)))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_looked_at_there_before_the_first_step_changes_nothing(name):
    model, optimizer, step = made(name)
    with torch.inference_mode():
        optimizer.metrics()
        optimizer.state_dict()
        model(torch.zeros(2, 5, dtype=torch.float64))
    torch.manual_seed(2)
    step()
    assert_same(went_on(model, optimizer, step), went_on(*with_a_step(name)))


@pytest.mark.parametrize("name", QUASI_NEWTON)
def test_factors_that_are_initialized_there_can_be_updated(name):
    found = []
    for there in (False, True):
        model, optimizer, step = made(name)
        x = torch.randn(20, 5, generator=torch.Generator().manual_seed(3)).double()
        with torch.inference_mode(there):
            optimizer.initialize([x])
        found.append(went_on(model, optimizer, step))
    assert_same(*found)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_that_is_made_there_is_made_of_ordinary_tensors(name):
    _, optimizer, _ = with_a_step(name)
    with torch.inference_mode():
        copied = copy.deepcopy(optimizer)
    assert not any(t.is_inference() for t in tensors(copied.state_dict()))
    assert not any(p.is_inference() for group in copied.param_groups for p in group["params"])
    assert_same(copied.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("name", ["KFAC", "KFRA", "KFLR"])
def test_averages_that_are_looked_at_there_are_given_back(name):
    model, optimizer, step = with_a_step(name)
    before = snapshot(model, optimizer)
    with torch.inference_mode(), optimizer.averaged_parameters():
        model(torch.zeros(2, 5, dtype=torch.float64))
    assert_same(snapshot(model, optimizer), before)
    assert_same(went_on(model, optimizer, step), went_on(*with_a_step(name)))
