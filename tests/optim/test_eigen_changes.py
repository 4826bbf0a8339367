"""EigenAdam on models that the loop changes while they train."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.eigen import batch, network, reloaded, train, values
from torch import nn
from torch.nn.utils import prune

import secondorder as so


def spare():
    return {"params": [nn.Parameter(torch.zeros(3, dtype=torch.float64))]}


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("at_first", [True, False], ids=["thawed", "frozen"])
@pytest.mark.parametrize("how", ["group", "copy", "load", "new"])
def test_a_layer_goes_on_as_it_has_begun_whatever_is_frozen_since(how, at_first, name):
    """Whether its bias has a state of its own is decided once, not whenever the optimizer looks for its matrices again."""
    model = network()
    getattr(model[2], name).requires_grad_(not at_first)
    optimizer = so.EigenAdam(model)
    train(model, optimizer, range(6))
    getattr(model[2], name).requires_grad_(at_first)
    train(model, optimizer, range(6, 9))
    other, changed = copy.deepcopy((model, optimizer))
    if how == "group":
        changed.add_param_group(spare())
    elif how == "new":
        changed = so.EigenAdam(other)
    if how in ("load", "new"):
        changed.load_state_dict(reloaded(optimizer.state_dict()))
    train(model, optimizer, range(9, 20))
    train(other, changed, range(9, 20))
    assert torch.equal(values(model), values(other))


def test_biases_may_come_later():
    model = network()
    biases = [p for p in model.parameters() if p.dim() == 1]
    optimizer = so.EigenAdam([p for p in model.parameters() if p.dim() == 2], model=model)
    train(model, optimizer, range(6))
    optimizer.add_param_group({"params": biases, "lr": 0.5})
    before = [bias.clone() for bias in biases]
    train(model, optimizer, range(6, 12))
    assert not any(torch.equal(bias, old) for bias, old in zip(biases, before, strict=True))
    assert optimizer.state[model[0].weight]["step"] == 12


def test_a_group_that_is_refused_leaves_the_others_as_they_were():
    model = network()
    optimizer = so.EigenAdam(model.named_parameters())
    (group,) = optimizer.param_groups
    params, names = list(group["params"]), list(group["param_names"])
    with pytest.raises(ValueError, match="expected lr"):
        optimizer.add_param_group({"params": list(model[0].named_parameters(prefix="0")), "lr": -1.0})
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0] is group
    assert list(map(id, group["params"])) == list(map(id, params)) and group["param_names"] == names
    optimizer.add_param_group({"params": list(model[0].named_parameters(prefix="0")), "lr": 0.5})
    assert [each["param_names"] for each in optimizer.param_groups] == [names[2:], names[:2]]


@pytest.mark.parametrize("change", ["the bias leaves", "pruned", "pruned and back"])
def test_a_layer_that_is_changed_begins_anew_and_others_go_on(change):
    model = network()
    optimizer = so.EigenAdam(model)
    losses = train(model, optimizer, range(8))
    if change == "the bias leaves":
        del optimizer.state[optimizer.param_groups[0]["params"].pop(3)]
    else:
        prune.l1_unstructured(model[2], "weight", 0.2)
        optimizer.add_param_group(spare())
        if change == "pruned and back":
            train(model, optimizer, range(3))
            prune.remove(model[2], "weight")
            optimizer.add_param_group(spare())
    train(model, optimizer, range(8, 12))
    optimizer.load_state_dict(reloaded(optimizer.state_dict()))
    assert sum(train(model, optimizer, range(12, 40))[-5:]) < sum(losses[:5])
    weight = getattr(model[2], "weight_orig", model[2].weight)
    assert optimizer.state[weight]["step"] == (35 if change == "pruned and back" else 32)  # the bias then stays by itself
    assert optimizer.state[model[0].weight]["step"] == optimizer._shared_state()["steps"] > 32


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_is_left_out_leaves_nothing_that_is_not_finite(bad):
    """Its forward pass was seen, but no step was made; the first mean input is that of the next batch's step."""
    model = network(act=nn.ReLU)
    optimizer = so.EigenAdam(model)
    x, y = batch(7)
    x[3, 4] = bad
    assert not F.cross_entropy(model(x), y).isfinite()
    losses = train(model, optimizer, range(20))
    assert all(state["mean"].isfinite().all() for state in optimizer.state.values() if "mean" in state)
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_layer_with_another_forward_is_not_seen():
    def patched(layer, before):
        forward = layer.forward
        layer.forward = lambda x: forward(before(x))

    def trained(model, optimizer, x):
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            losses.append(F.cross_entropy(model(x), torch.arange(len(x)) % 3))
            losses[-1].backward()
            optimizer.step()
        return losses

    before = nn.Linear(7, 25).double()
    x = torch.randn(32, 7, dtype=torch.float64)
    model = network()
    patched(model[0], before)
    losses = trained(model, so.EigenAdam(model), x)
    assert losses[-1] < losses[0]
    model = network()
    optimizer = so.EigenAdam(model)
    patched(model[0], before)
    with pytest.warns(UserWarning, match="sees no inputs of 0.weight: .* given another forward since"):
        losses = trained(model, optimizer, x)
    assert losses[-1] < losses[0]


def test_a_weight_that_gets_another_shape_is_named():
    model = network()
    optimizer = so.EigenAdam(model)
    train(model, optimizer, range(6))
    with torch.no_grad():
        model[0].weight.data, model[0].bias.data = model[0].weight[:30], model[0].bias[:30]
        model[2].weight.data = model[2].weight[:, :30]
    before = values(model)
    for _ in range(2):  # with and without a renewal
        model.zero_grad()
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        with pytest.raises(RuntimeError, match=r"shapes that they have had so far, got \[30, 25\] for '0.weight'"):
            optimizer.step()
        optimizer._shared_state()["steps"] -= 1
    assert torch.equal(values(model), before)


def test_the_step_length_is_that_of_a_beginning_where_parameters_enter():
    """What a head could do alone says nothing of what is below it."""
    torch.manual_seed(0)
    body, head = nn.Sequential(nn.Linear(20, 16), nn.Tanh()).double(), nn.Linear(16, 3).double()
    x, y = torch.randn(256, 20).double(), torch.randint(3, (256,))
    body.requires_grad_(False)
    optimizer = so.EigenAdam(nn.Sequential(body, head))

    def step(factor=1.0):
        optimizer.zero_grad()
        (factor * F.cross_entropy(head(body(x)), y)).backward()
        optimizer.step()

    for _ in range(80):
        step()
    grown = optimizer.metrics()["length"]
    assert grown > 0.02
    body.requires_grad_(True)
    with pytest.raises(so.NonFiniteError):
        step(math.inf)
    assert optimizer.metrics()["length"] == grown  # a step that is not made changes nothing
    step()
    assert 0.005 < optimizer.metrics()["length"] <= 0.01 * math.exp(0.05)
    step()
    assert optimizer.metrics()["length"] <= 0.01 * math.exp(0.1)
