"""Models as they come: the curvatures of all their linear layers, and steps, against computations that know of no tape."""

import warnings

import pytest
import torch
from helpers.optimizers import ALL, FIXED, parameters
from oracles import pos_eig_matrix
from torch import nn
from torch.nn import functional as F

from secondorder._layers import linear_layers
from secondorder._tape import Tape, TapeOptions
from secondorder.curvature import PCH

pytestmark = pytest.mark.filterwarnings("ignore:secondorder")
GAMMA = -1.0


def tape_blocks(model, criterion, *args, target):
    """The tape's H by layer name, and the layers that start from their Fisher block."""
    tape = Tape(linear_layers(model), criterion, TapeOptions(diagonal=True))
    criterion(model(*args), target).backward()
    records = tape.records()
    names = {layer: name for name, layer in model.named_modules()}
    hessians = PCH(GAMMA).bias_hessians(records)
    tape.remove()
    return {names[layer]: h for layer, h in hessians.items()}, {names[r.layer] for r in records if r.obstacle}


def recursion(above, weight, function, z, delta):
    """Eq. 8 for one layer: from H above it, the next layer's weight, and delta = dL/dh of the elementwise h = function(z)."""
    z = z.detach().requires_grad_()
    (d1,) = torch.autograd.grad(function(z).sum(), z, create_graph=True)
    d2 = torch.autograd.grad(d1.sum(), z)[0] if d1.requires_grad else torch.zeros_like(z)
    d1, d2 = (t.detach().flatten(0, -2) for t in (d1, d2))
    diagonal = (d2 * delta.flatten(0, -2)).sum(0)
    moment = sum(torch.outer(d, d) for d in d1) / len(d1)
    return (weight.T @ above @ weight) * moment + torch.diag(torch.where(diagonal < 0, GAMMA * diagonal, diagonal))


def chain(layers, functions, h, loss):
    """H of every layer of a fully connected net with `functions` between its layers, and dL/dh for its input h [m, n_in]."""
    tensors, zs = [h.detach().requires_grad_()], []
    for layer, function in zip(layers, [*functions, None], strict=True):
        zs.append(F.linear(tensors[-1], layer.weight, layer.bias))
        tensors.append(zs[-1] if function is None else function(zs[-1]))
    deltas = torch.autograd.grad(loss(zs[-1]), tensors[:-1], retain_graph=True)
    z = zs[-1].detach()
    full = torch.func.hessian(loss)(z).flatten(0, z.dim() - 2).flatten(1, z.dim() - 1)
    m, k = z.shape[:-1].numel(), z.shape[-1]
    full = full.reshape(m, k, m, k)
    blocks = [pos_eig_matrix(sum(full[i, :, i] for i in range(m)), GAMMA)]
    for t in range(len(layers) - 1, 0, -1):
        blocks.append(recursion(blocks[-1], layers[t].weight.detach(), functions[t - 1], zs[t - 1], deltas[t]))
    return blocks[::-1], deltas[0]


def rowwise_fisher(model, layer, criterion, *args, target):
    """E over the instances, run one by one, of the sum over their rows of delta delta^T; no coupling between instances."""
    total = 0
    for i in range(len(target)):
        outputs = []
        handle = layer.register_forward_hook(lambda module, args, output, outputs=outputs: outputs.append(output))
        loss = criterion(model(*(a[i : i + 1] for a in args)), target[i : i + 1])
        handle.remove()
        for delta in torch.autograd.grad(loss, outputs[0])[0].flatten(0, -2):
            total = total + torch.outer(delta, delta) / len(target)
    return total


class TwoInputs(nn.Module):
    """A trunk and a branch net, joined by a product, with plain functions as activations."""

    def __init__(self):
        super().__init__()
        self.trunk, self.branch = nn.Linear(3, 6), nn.Linear(2, 6)
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def features(self, x, t):
        return torch.tanh(self.trunk(x)) * torch.sigmoid(self.branch(t))

    def forward(self, x, t):
        return self.last(F.silu(self.first(self.features(x, t))))


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.MSELoss()])
def test_two_inputs(criterion):
    model = TwoInputs().double()
    x, t = torch.randn(7, 3).double(), torch.randn(7, 2).double()
    y = torch.randint(3, (7,)) if isinstance(criterion, nn.CrossEntropyLoss) else torch.randn(7, 3).double()
    actual, restarted = tape_blocks(model, criterion, x, t, target=y)
    assert restarted == {"trunk", "branch"}
    expected, _ = chain([model.first, model.last], [F.silu], model.features(x, t), lambda z: criterion(z, y))
    torch.testing.assert_close(actual["first"], expected[0])
    torch.testing.assert_close(actual["last"], expected[1])
    for name in restarted:
        torch.testing.assert_close(actual[name], rowwise_fisher(model, model.get_submodule(name), criterion, x, t, target=y))


def test_dropout_in_between_is_part_of_the_function():
    layers = [nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)]
    model = nn.Sequential(layers[0], nn.GELU(), nn.Dropout(0.4), layers[1], nn.Dropout(0.2), nn.Tanh(), layers[2]).double()
    criterion, x, y = nn.CrossEntropyLoss(), torch.randn(9, 4).double(), torch.randint(3, (9,))
    torch.manual_seed(5)
    actual, restarted = tape_blocks(model, criterion, x, target=y)
    torch.manual_seed(5)
    masks = [F.dropout(torch.ones(9, n).double(), p) for n, p in ((8, 0.4), (6, 0.2))]
    functions = [lambda z: F.gelu(z) * masks[0], lambda z: torch.tanh(z * masks[1])]
    expected, _ = chain(layers, functions, x, lambda z: criterion(z, y))
    assert not restarted
    for name, block in zip(("0", "3", "6"), expected, strict=True):
        torch.testing.assert_close(actual[name], block)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_behind_a_norm_a_layer_starts_from_its_fisher_block(norm):
    layers = [nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 3)]
    normalize = nn.LayerNorm(6) if norm == "layer" else nn.BatchNorm1d(6)
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1], normalize, nn.SiLU(), layers[2], nn.Tanh(), layers[3]).double()
    criterion, x, y = nn.CrossEntropyLoss(), torch.randn(9, 4).double(), torch.randint(3, (9,))
    actual, restarted = tape_blocks(model, criterion, x, target=y)
    assert restarted == {"2"}
    above, _ = chain(layers[2:], [torch.tanh], model[:5](x), lambda z: criterion(z, y))
    torch.testing.assert_close(actual["5"], above[0])
    torch.testing.assert_close(actual["7"], above[1])
    # BatchNorm couples the instances: what stands for instance i is row i of the batch's gradient.
    z = model[:3](x).detach().requires_grad_()
    (rows,) = torch.autograd.grad(criterion(model[3:](z), y), z)
    block = 9 * sum(torch.outer(row, row) for row in rows)
    torch.testing.assert_close(actual["2"], block)
    if norm == "layer":
        torch.testing.assert_close(block, rowwise_fisher(model, layers[1], criterion, x, target=y))
    (delta,) = torch.autograd.grad(criterion(model[2:](h := model[:2](x).detach().requires_grad_()), y), h)
    below = recursion(block, layers[1].weight.detach(), torch.tanh, layers[0](x), delta)
    torch.testing.assert_close(actual["0"], below)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.up, self.down, self.head = nn.Linear(4, 6), nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        return self.head(h + self.down(F.gelu(self.up(h))))


def test_residual_nets():
    model, criterion = Residual().double(), nn.CrossEntropyLoss()
    x, y = torch.randn(8, 4).double(), torch.randint(3, (8,))
    actual, restarted = tape_blocks(model, criterion, x, target=y)
    assert restarted == {"stem", "down"}
    for name in restarted:
        torch.testing.assert_close(actual[name], rowwise_fisher(model, model.get_submodule(name), criterion, x, target=y))
    h = torch.tanh(model.stem(x)).detach()
    z = model.up(h).detach()
    (delta,) = torch.autograd.grad(criterion(model.head(h + model.down(a := F.gelu(z).requires_grad_())), y), a)
    torch.testing.assert_close(actual["up"], recursion(actual["down"], model.down.weight.detach(), F.gelu, z, delta))
    above, _ = chain([model.head], [], h + model.down(F.gelu(z)), lambda z: criterion(z, y))
    torch.testing.assert_close(actual["head"], above[0])


class Classifier(nn.Module):
    """A transformer's encoder layer over [m, 5, 4], pooled, and a fully connected head."""

    def __init__(self, pool=True):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 7, dropout=0.0, batch_first=True)
        self.hidden, self.head, self.pool = nn.Linear(4, 6), nn.Linear(6, 3), pool

    def features(self, x):
        h = self.encoder(x)
        return h.mean(1) if self.pool else h

    def forward(self, x):
        z = self.head(torch.tanh(self.hidden(self.features(x))))
        return z if self.pool else z.transpose(1, 2)  # cross-entropy has the classes second


@pytest.mark.parametrize("pool", [True, False])
def test_transformers(pool):
    model, criterion, m = Classifier(pool).double(), nn.CrossEntropyLoss(), 6
    x, y = torch.randn(m, 5, 4).double(), torch.randint(3, (m,) if pool else (m, 5))
    actual, restarted = tape_blocks(model, criterion, x, target=y)
    assert restarted == {"encoder.linear2"}
    assert "encoder.self_attn.out_proj" not in actual  # it is called as a function, and gets the fallback
    features = model.features(x).detach().flatten(0, -2)
    expected, _ = chain([model.hidden, model.head], [torch.tanh], features, lambda z: criterion(z, y.flatten()))
    torch.testing.assert_close(actual["hidden"], expected[0])
    torch.testing.assert_close(actual["head"], expected[1])
    # Tokens are instances where each has a loss; where they are pooled the instance is the sequence.
    fisher = rowwise_fisher(model, model.encoder.linear2, criterion, x, target=y)
    torch.testing.assert_close(actual["encoder.linear2"], fisher if pool else 5 * fisher)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, x):
        return self.head(self.body(x))


BODIES = {
    "cnn": (Images, lambda m: torch.randn(m, 1, 6, 6)),
    "transformer": (Classifier, lambda m: torch.randn(m, 5, 4)),
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", ALL)
def test_a_head_on_a_frozen_body_trains_as_the_head_alone(name, body):
    make, inputs = BODIES[body]
    torch.manual_seed(2)
    model, alone = make().double(), make().double()
    alone.load_state_dict(model.state_dict())
    head = (lambda m: m.head) if body == "cnn" else (lambda m: nn.Sequential(m.hidden, nn.Tanh(), m.head))
    extract = (lambda m: m.body) if body == "cnn" else (lambda m: m.features)
    for part in model.modules():
        if part is not model:
            part.requires_grad_(False)
    whole, small = model, head(alone)
    head(model).requires_grad_(True)
    criterion = nn.CrossEntropyLoss()
    optimizers = [ALL[name](whole, criterion), ALL[name](small, criterion)]
    frozen = parameters(model)
    for seed in range(3):
        torch.manual_seed(seed)
        x, y = inputs(8).double(), torch.randint(3, (8,))
        features = extract(alone)(x).detach()
        for net, input, optimizer in ((whole, x, optimizers[0]), (small, features, optimizers[1])):
            torch.manual_seed(seed)

            def closure(net=net, input=input, optimizer=optimizer, y=y):
                optimizer.zero_grad()
                loss = criterion(net(input), y)
                loss.backward()
                return loss

            optimizer.step(closure)
    torch.testing.assert_close(parameters(head(model)), parameters(small))
    moved = (parameters(model) != frozen).sum()
    assert moved == parameters(small).numel()


@pytest.mark.parametrize("name", FIXED)
def test_a_body_beside_the_covered_layers_gets_sgd(name):
    torch.manual_seed(2)
    model, criterion = Images().double(), nn.CrossEntropyLoss()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kwargs = {"max_increase": float("inf")} if name.startswith("KBFGS") else {}
        optimizer = ALL[name](model, criterion, weight_decay=0.0, **kwargs)
        torch.manual_seed(0)
        x, y = torch.randn(8, 1, 6, 6).double(), torch.randint(3, (8,))
        before = {n: p.detach().clone() for n, p in model.body.named_parameters()}
        gradients = torch.autograd.grad(criterion(model(x), y), list(model.body.parameters()))

        def closure():
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert sum("updated by the fallback" in str(w.message) for w in caught) == 1
    for (n, p), gradient in zip(model.body.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(p.detach(), before[n] - 0.1 * gradient)
