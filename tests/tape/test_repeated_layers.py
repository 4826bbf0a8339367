"""Layers that a loss uses several times: their factors, over all uses, against plain autograd in float64."""

import copy
import warnings

import pytest
import torch
from helpers.optimizers import ALL, parameters
from torch import nn
from torch.nn import functional as F

import secondorder as so
from secondorder._layers import linear_layers
from secondorder._tape import Tape, TapeOptions
from secondorder.curvature import CURVATURES


class Recurrent(nn.Module):
    """One layer four times, each time on its own output."""

    def __init__(self):
        super().__init__()
        self.stem, self.cell, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        for _ in range(4):
            h = F.silu(self.cell(h))
        return self.head(h)


class Ode(nn.Module):
    """Euler's method: a net of two layers three times."""

    def __init__(self):
        super().__init__()
        self.field, self.head = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)), nn.Linear(5, 3)

    def forward(self, x):
        for _ in range(3):
            x = x + 0.3 * self.field(x)
        return self.head(x)


class Siamese(nn.Module):
    """One encoder for both halves of the features."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head((self.encoder(x) - self.encoder(x.flip(1))).abs())


class Tied(nn.Module):
    """Two modules with one weight and one bias."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x):
        return self.head(torch.tanh(self.second(F.gelu(self.first(x)))))


class Pairs(nn.Module):
    """The criterion sees two outputs of one layer."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x):
        return self.body(x) - self.body(x.flip(1))


class Joined(Pairs):
    """Two batches, one after the other."""

    def forward(self, x):
        return torch.cat([self.body(x[:4]), self.body(x[4:])])


# The net, the layers that it uses several times, those that lead there, and where the calls of a layer by another module go.
NETS = {
    "recurrent": (Recurrent, {"cell"}, {"stem"}, {}),
    "neural ODE": (Ode, {"field.0", "field.2"}, set(), {}),
    "siamese": (Siamese, {"encoder.0", "encoder.2"}, set(), {}),
    "tied": (Tied, {"first"}, set(), {"second": "first"}),
    "pairs": (Pairs, {"body.0", "body.2"}, set(), {}),
    "joined": (Joined, {"body.0", "body.2"}, set(), {}),
}
every_net = pytest.mark.parametrize("name", NETS)


def uses(model, tied, x):
    """Of every layer the inputs h [m, n_in] and outputs z [m, n_out] of all its uses, and the model's output."""
    inputs, outputs, handles = {}, {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            key = tied.get(name, name)

            def hook(module, args, output, name=key):
                inputs.setdefault(name, []).append(args[0].detach())
                outputs.setdefault(name, []).append(output)

            handles.append(layer.register_forward_hook(hook))
    output = model(x)
    for handle in handles:
        handle.remove()
    return inputs, outputs, output


def problem(name, criterion):
    torch.manual_seed(3)
    model = NETS[name][0]().double()
    x = torch.randn(9, 5).double()
    return model, x, torch.randint(3, (9,)) if isinstance(criterion, nn.CrossEntropyLoss) else torch.randn(9, 3).double()


def records_of(model, criterion, curvature, *batches):
    layers = linear_layers(model)
    tape = Tape(layers, criterion, curvature.tape_options(), model)
    for x, y in batches:
        criterion(model(x), y).backward()
    records = tape.records()
    tape.remove()
    return {layers[record.layer]: record for record in records}, curvature.bias_hessians(records)


@every_net
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.MSELoss(), nn.MSELoss(reduction="sum")])
@pytest.mark.parametrize("curvature", ["pch-abs", "fisher-empirical"])
def test_fisher_blocks_are_sums_over_all_uses(name, criterion, curvature):
    model, x, y = problem(name, criterion)
    _, repeated, leading, tied = NETS[name]
    records, hessians = records_of(model, criterion, CURVATURES[curvature], (x, y))
    inputs, outputs, output = uses(model, tied, x)
    loss = criterion(output, y)
    m = 9 if criterion.reduction == "mean" else 1
    if curvature == "pch-abs":
        assert {n for n, record in records.items() if record.obstacle} >= repeated | leading
    for layer in repeated | leading:
        deltas = torch.cat(torch.autograd.grad(loss, outputs[layer], retain_graph=True))
        block = m * sum(torch.outer(delta, delta) for delta in deltas)
        torch.testing.assert_close(hessians[records[layer].layer], block)
        h = torch.cat(inputs[layer])
        found = records[layer].input()
        torch.testing.assert_close(found.mean(0), h.mean(0))
        torch.testing.assert_close(found.T @ found, h.T @ h)


@every_net
@pytest.mark.parametrize("curvature", ["kflr", "fisher-exact"])
def test_columns_are_sums_over_all_uses(name, curvature):
    criterion = nn.CrossEntropyLoss()
    model, x, y = problem(name, criterion)
    records, hessians = records_of(model, criterion, CURVATURES[curvature], (x, y))
    _, outputs, output = uses(model, NETS[name][3], x)
    p = output.detach().softmax(1)
    expected = dict.fromkeys(outputs, 0)
    for i in range(9):
        root = torch.linalg.cholesky(torch.diag(p[i]) - torch.outer(p[i], p[i]) + 1e-14 * torch.eye(3)) / 3  # over sqrt(9)
        for c in range(3):
            for layer, zs in outputs.items():
                for delta in torch.autograd.grad(output[i] @ root[:, c], zs, retain_graph=True, allow_unused=True):
                    if delta is not None:
                        row = delta.sum(0)  # of instance i alone
                        expected[layer] = expected[layer] + torch.outer(row, row)
    for layer, record in records.items():
        torch.testing.assert_close(hessians[record.layer], expected[layer], rtol=1e-6, atol=1e-9)


def test_a_layer_used_once_by_each_of_two_losses_has_no_obstacle():
    model, criterion = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double(), nn.CrossEntropyLoss()
    x, y = torch.randn(9, 5).double(), torch.randint(3, (9,))
    records, _ = records_of(model, criterion, CURVATURES["pch-abs"], (x[:4], y[:4]), (x[4:], y[4:]))
    assert not any(record.obstacle for record in records.values())


@every_net
@pytest.mark.parametrize("optimizer", [n for n in ALL if n not in ("KFRA", "KFLR")])
def test_every_optimizer_trains_them_and_says_so_once(name, optimizer):
    criterion = nn.CrossEntropyLoss()
    model, x, y = problem(name, criterion)
    if name in ("pairs", "joined"):
        model = nn.Sequential(model)
    made, losses = ALL[optimizer](model, criterion), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):

            def closure():
                made.zero_grad()
                loss = criterion(model(x), y)
                loss.backward()
                return loss

            losses.append(float(made.step(closure)))
    assert losses[-1] < losses[0]
    said = [str(w.message) for w in caught if "several times for a loss" in str(w.message)]
    assert len(said) == len(set(said))
    assert not any("fallback" in str(w.message) for w in caught)
    if said:
        assert "empirical Fisher, since its output is computed several times for a loss" in repr(made)


def test_a_weight_of_an_embedding_gets_the_fallback_and_says_why():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(7, 4), "hidden": nn.Linear(4, 4), "head": nn.Linear(4, 7, bias=False)}
    ).double()
    model["head"].weight = model["embedding"].weight
    tokens, criterion = torch.randint(7, (12,)), nn.CrossEntropyLoss()

    def loss():
        return criterion(model["head"](torch.tanh(model["hidden"](model["embedding"](tokens)))), tokens)

    optimizer = so.EACG(model, criterion, lr=0.1, momentum=0.0)
    before, value = copy.deepcopy(model.state_dict()), loss()
    value.backward()
    with pytest.warns(UserWarning, match="weight of layer 'head' is shared by 'embedding' and 'head'"):
        optimizer.step()
    weight = model["head"].weight
    torch.testing.assert_close(weight.detach(), before["head.weight"] - 0.1 * weight.grad)
    assert "head (4 -> 7): no curvature" in repr(optimizer)
    # The recursion goes through the head all the same.
    assert "hidden (4 -> 4): pch-abs by ea-cg" in repr(optimizer)
    with pytest.raises(ValueError, match="shared by 'a' and 'b'"):
        pair = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
        pair["b"].weight = pair["a"].weight
        so.EACG(pair, criterion)


class Mirrored(nn.Module):
    """An autoencoder whose decoder is its encoder's transpose, written as `way` says."""

    def __init__(self, way):
        super().__init__()
        self.hidden, self.code, self.way = nn.Linear(5, 6), nn.Linear(6, 4, bias=False), way

    def forward(self, x):
        return self.way(self.code(torch.tanh(self.hidden(x))), self.code.weight) @ self.hidden.weight


OUTSIDE = {
    "F.linear, transposed": lambda z, w: F.linear(z, w.t()),
    "matmul": lambda z, w: z @ w,
    "of sequences": lambda z, w: (z.view(3, 3, 4) @ w).view(9, 6),
    "instance by instance": lambda z, w: torch.stack([w.T @ row for row in z]),
    "einsum": lambda z, w: torch.einsum("mo,oi->mi", z, w),
    "called again, by hand": lambda z, w: F.linear(F.linear(z, w.mT), w) @ w,
}


def said_of_products(model, optimizer, loss):
    """What steps say of products with weights outside of the layers' calls."""
    criterion = nn.MSELoss()
    made = ALL[optimizer](model, criterion)

    def closure():
        made.zero_grad()
        value = loss(criterion)
        value.backward()
        return value

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            made.step(closure)
    return [str(w.message) for w in caught if "outside of the layers' calls" in str(w.message)]


@pytest.mark.parametrize("way", OUTSIDE)
@pytest.mark.parametrize("optimizer", ALL)
def test_a_weight_that_is_multiplied_with_outside_of_its_layer_is_told_of_once(way, optimizer):
    torch.manual_seed(0)
    model, x = Mirrored(OUTSIDE[way]).double(), torch.randn(9, 5).double()
    (said,) = said_of_products(model, optimizer, lambda criterion: criterion(model(x), x))
    assert "'code'" in said and "'hidden'" in said


@pytest.mark.parametrize("optimizer", ["EACG", "KFAC", "KFLR", "KBFGS"])
def test_derivatives_penalties_and_frozen_weights_are_no_products_outside(optimizer):
    torch.manual_seed(0)
    model, x = Mirrored(lambda z, w: z @ w.detach()).double(), torch.randn(9, 5).double().requires_grad_()
    model = nn.Sequential(model.hidden, nn.Tanh(), model.code, nn.Linear(4, 5)).double()

    def loss(criterion):
        output = model(x)
        (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        frozen = model[3].weight.detach()
        return criterion(output + slope @ frozen @ frozen.T, x.detach())

    assert not said_of_products(model, optimizer, loss)
    assert not said_of_products(model, "EACG", lambda criterion: criterion(model(x), x) + model[2].weight.square().sum())


@pytest.mark.parametrize("optimizer", ["EACG", "KFLR", "KBFGS"])
def test_products_of_passes_that_no_loss_goes_through_are_not_told_of(optimizer):
    torch.manual_seed(0)
    model, x, y = Mirrored(lambda z, w: z @ w).double(), torch.randn(9, 5).double(), torch.randn(9, 4).double()

    def loss(criterion):
        criterion(model(x), x)  # for a log
        return criterion(model.code(torch.tanh(model.hidden(x))), y)

    assert not said_of_products(model, optimizer, loss)


def test_tied_layers_train_as_one_layer_called_twice():
    results = []
    for tied in (True, False):
        torch.manual_seed(1)
        model = Tied().double()
        if not tied:
            model.second = model.first
        optimizer, criterion = so.EACG(model, nn.CrossEntropyLoss(), 0.1), nn.CrossEntropyLoss()
        x, y = torch.randn(9, 5).double(), torch.randint(3, (9,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(3):
                optimizer.zero_grad()
                optimizer.criterion(model(x), y).backward()
                optimizer.step()
        results.append(parameters(model))
        assert criterion is not optimizer.criterion
    assert torch.equal(*results)


def two_losses(model, criterion, x, y):
    """One that uses every layer once, and one that uses it twice."""
    return criterion(model(x), y) + 0.3 * criterion(model(x[:4]) - model(x[4:8]), y[:4])


def test_calls_of_a_loss_that_uses_a_layer_once_count_with_those_of_another_loss():
    model, criterion = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double(), nn.MSELoss(reduction="sum")
    x, y = torch.randn(9, 5).double(), torch.randn(9, 3).double()
    tape = Tape(linear_layers(model), criterion, TapeOptions(diagonal=True))
    outputs = []
    handle = model[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    blocks = []
    for _ in range(2):
        outputs.clear()
        loss = two_losses(model, criterion, x, y)
        deltas = torch.autograd.grad(loss, outputs, retain_graph=True)
        loss.backward()
        records = tape.records()
        blocks.append(CURVATURES["pch-abs"].bias_hessians(records)[model[0]])
        tape.clear(release=True)
    handle.remove()
    parts = [scale * delta.T @ delta for scale, delta in zip((1.0, 1 / 0.3, 1 / 0.3), deltas, strict=True)]
    torch.testing.assert_close(blocks[1], sum(parts))
    # At the first step, the first loss had passed when the second one came: its rows count as the others do.
    torch.testing.assert_close(blocks[0], (parts[1] + parts[2]) * 17 / 8)


@pytest.mark.parametrize("curvature", ["fisher-empirical", "pch-abs"])
def test_deltas_are_those_of_the_whole_loss_where_it_differentiates(curvature):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    x, y, criterion = torch.randn(9, 5).double().requires_grad_(), torch.randn(9, 3).double(), nn.MSELoss()
    chosen = CURVATURES[curvature]
    tape = Tape(linear_layers(model), criterion, chosen.tape_options())
    outputs = []
    handle = model[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    output = model(x)
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    loss = criterion(output, y) + 0.3 * (slope.norm(dim=1) - 1).square().mean()
    (delta,) = torch.autograd.grad(loss, outputs[0], retain_graph=True)
    handle.remove()
    loss.backward()
    torch.testing.assert_close(chosen.bias_hessians(tape.records())[model[0]], 9 * delta.T @ delta)
