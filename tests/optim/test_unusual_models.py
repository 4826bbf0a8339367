"""Layers that no curvature covers, or that change once the optimizer is made: the rest trains, or an error says why."""

import copy
import re
import warnings

import pytest
import torch
from helpers.optimizers import ALL, parameters
from helpers.training import assert_same
from helpers.unusual import batch, every, fixed, network, run
from torch import nn
from torch.nn.utils import parametrizations, prune

import secondorder as so

CHANGES = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}


@fixed
@pytest.mark.parametrize("how", CHANGES)
def test_a_layer_that_computes_its_weight_gets_the_fallback_and_says_why(name, how):
    model = network()
    CHANGES[how](model[2])
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = run(model, optimizer, steps=6)
    assert losses[-1] < losses[0]
    (said,) = [str(w.message) for w in caught if "fallback" in str(w.message)]
    assert "layer '2' computes its weight from other parameters" in said


@every
@pytest.mark.parametrize("how", CHANGES)
def test_a_layer_that_is_changed_after_construction_is_an_error(name, how):
    model = network()
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    run(model, optimizer)
    CHANGES[how](model[2])
    before = parameters(model)
    with pytest.raises(RuntimeError, match="layer '2' has been given a parametrization, norm or pruning mask since"):
        run(model, optimizer)
    assert torch.equal(parameters(model), before)


def test_nets_of_such_layers_alone_are_refused_with_the_reason():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="layer '0' computes its weight from other parameters .*EigenAdam trains any model"):
        so.EACG(model, nn.MSELoss())
    tied = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "head": nn.Linear(2, 3)})
    tied["head"].weight = tied["embedding"].weight
    with pytest.raises(ValueError, match="same bias. secondorder.EigenAdam trains"):  # and not that they are frozen
        so.EACG(tied, nn.MSELoss())
    with pytest.raises(ValueError, match="got the lazy '0'; call the model once first"):
        so.EACG(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), nn.MSELoss())


@every
def test_parameters_instead_of_a_model_give_the_recipe(name):
    cls = type(ALL[name](network(), nn.CrossEntropyLoss()))
    with pytest.raises(TypeError, match=rf"optimizer=lambda params, \*\*options: secondorder.{cls.__name__}\(net.module_, "):
        cls(network().parameters(), lr=0.1)
    with pytest.raises(TypeError, match="expected criterion to be an nn.Module or a function .* got none"):
        cls(network())


@every
def test_layers_wider_than_the_limit_get_the_fallback_and_say_so(name):
    if name == "KBFGSL":
        return  # its factor of the outputs has no more than `memory` rows
    model = network()
    optimizer = ALL[name](model, nn.CrossEntropyLoss(), max_factor_dim=5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = run(model, optimizer, steps=5)
    assert losses[-1] < losses[0]
    said = [str(w.message) for w in caught]
    assert sum("layer '2' has 6 outputs, more than max_factor_dim = 5" in message for message in said) == 1
    assert "2 (5 -> 6): no curvature" in repr(optimizer)
    key = "inverse_output" if name.startswith("KBFGS") else "factors"
    assert [key in optimizer.state.get(layer.weight, {}) for layer in (model[0], model[2], model[4])] == [True, False, True]
    with pytest.raises(ValueError, match="max_factor_dim to be an int >= 1, or None"):
        ALL[name](network(), nn.CrossEntropyLoss(), max_factor_dim=0)


def test_below_a_wide_layer_the_recursion_starts_from_the_fisher_block():
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 40)).double(), batch()
    optimizer = so.EACG(model, nn.CrossEntropyLoss(), max_factor_dim=39)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(model, optimizer)
    assert any("leads to layer '2', which is too wide for a curvature" in str(w.message) for w in caught)
    torch.manual_seed(0)
    again = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 40)).double()
    z = again[0](x).detach().requires_grad_()
    (deltas,) = torch.autograd.grad(nn.functional.cross_entropy(again[1:](z), y), z)
    torch.testing.assert_close(optimizer.state[model[0].weight]["factors"]["bias_hessian"], 10 * deltas.T @ deltas)


@every
@pytest.mark.parametrize("how", ["group", "layer"])
def test_parameters_of_layers_that_have_been_replaced_are_refused(name, how):
    model = network()
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    run(model, optimizer)
    model[4] = nn.Linear(6, 3).double()
    state, before = copy.deepcopy(list(optimizer.state.values())), parameters(model)
    with pytest.raises(ValueError, match="got 2 others; where modules have been added or replaced since, make a new optimizer"):
        if how == "layer":
            optimizer.add_param_group({"params": model[4].parameters()})
        else:
            optimizer.param_groups[0]["params"] = list(model.parameters())
            run(model, optimizer)
    assert torch.equal(parameters(model), before)
    assert_same(list(optimizer.state.values()), state)


@every
def test_a_weight_that_takes_the_place_of_a_layers_own_is_trained(name):
    model = network()
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    run(model, optimizer)
    weight = model[2].weight = nn.Parameter(model[2].weight + 0.1)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    before = weight.clone()
    run(model, optimizer)
    assert not torch.equal(weight, before)


@every
def test_weights_of_other_shapes_are_refused(name):
    """As those of a net whose units have been pruned."""
    model = network()
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    run(model, optimizer)
    model[2].weight, model[2].bias = nn.Parameter(model[2].weight[:4].detach()), nn.Parameter(model[2].bias[:4].detach())
    model[4].weight = nn.Parameter(model[4].weight[:, :4].detach())
    optimizer.param_groups[0]["params"] = list(model.parameters())
    before = parameters(model)
    with pytest.raises(RuntimeError, match=r"got \[4, 5\] in place of \[6, 5\] in layer '2'; make the optimizer anew"):
        run(model, optimizer)
    assert torch.equal(parameters(model), before)


@every
@pytest.mark.parametrize("kind", ["sparse", "csr", "nested"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_inputs_that_are_sparse_or_nested_are_refused_with_what_to_write(name, kind):
    model, (x, y) = network(), batch()
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    if kind == "nested":
        x = torch.nested.nested_tensor([x[:4], x[4:]], layout=torch.jagged)
    else:
        x = x.to_sparse() if kind == "sparse" else x.to_sparse_csr()
    write = "the rows alone, x.values()" if kind == "nested" else "x.to_dense()"
    with pytest.raises(TypeError, match=rf"layer '0': expected an input that is an ordinary tensor, .* {re.escape(write)}"):
        run(model, optimizer, lambda: optimizer.criterion(model(x).values() if kind == "nested" else model(x), y))
