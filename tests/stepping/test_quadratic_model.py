"""The quadratic model of a recorded loss against explicit matrices, and products through chains and other nets."""

import copy

import pytest
import torch
from helpers.training import batch, network
from oracles import dense_gauss_newton
from torch import nn
from torch.func import functional_call, hessian, jvp
from torch.nn import functional as F

from secondorder._layers import linear_layers
from secondorder._tape import Tape, TapeOptions
from secondorder._tensors import Transfer
from secondorder.criteria import BoundedClassificationLoss
from secondorder.stepping import LocalLoss, QuadraticModel, recorded_loss
from secondorder.stepping.recorded_loss import ChainLoss


def local_loss(model, criterion, x, y, fraction=1.0, offset=0):
    """A recorded LocalLoss, its parameters and their gradients."""
    tape = Tape(linear_layers(model), criterion, TapeOptions(keep_inputs=True), model)
    model.zero_grad()
    criterion(model(x), y).backward()
    local = LocalLoss(model, criterion, tape.losses, list(model.parameters()), fraction, offset, tape)
    return local, [p.detach() for p in model.parameters()], [p.grad.clone() for p in model.parameters()]


CASES = {
    "cross-entropy": (nn.CrossEntropyLoss(), None, lambda y: y),
    "mse": (nn.MSELoss(), None, lambda y: F.one_hot(y, 3).double()),
    "eq14": (BoundedClassificationLoss(), -1.0, lambda y: y),
}


@pytest.mark.parametrize("case", CASES)
def test_the_quadratic_model_is_the_explicit_one(case):
    criterion, gamma, target = CASES[case]
    model, (x, y) = network(), batch(7)
    y = target(y)
    local, parameters, gradients = local_loss(model, criterion, x, y)
    vectors = [[torch.randn_like(p) for p in parameters] for _ in range(2)]
    first, gram = local.products(vectors, Transfer())()
    matrix = dense_gauss_newton(model, criterion, x, y, gamma)
    v = torch.stack([torch.cat([t.reshape(-1) for t in vector]) for vector in vectors])
    g = torch.cat([t.reshape(-1) for t in gradients])
    assert local.start == pytest.approx(criterion(model(x), y).item(), rel=1e-12)
    torch.testing.assert_close(first, v @ g)
    torch.testing.assert_close(gram, v @ matrix @ v.T)
    # The minimum of the damped and decayed model over the span, and what it predicts there.
    tau, eta = 0.3, 0.05
    step = QuadraticModel(local, gradients, [eta] * len(parameters)).best_step(vectors, tau)()
    c = matrix + (tau + eta) * torch.eye(len(g)).double()
    expected = -torch.linalg.solve(v @ c @ v.T, v @ g)
    torch.testing.assert_close(step.coefficients, expected)
    delta = expected @ v
    torch.testing.assert_close(torch.cat([t.reshape(-1) for t in step.delta]), delta)
    assert step.predicted == pytest.approx(float(delta @ g + delta @ c @ delta / 2), rel=1e-9)
    undamped = matrix + eta * torch.eye(len(g)).double()
    assert step.undamped == pytest.approx(float(delta @ g + delta @ undamped @ delta / 2), rel=1e-9)
    assert step.modelled == pytest.approx(float(delta @ g + delta @ matrix @ delta / 2), rel=1e-9)


class Squeezed(nn.Module):
    """A regression net as people write it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.second(F.silu(self.first(x))).squeeze(-1)


class Standardised(nn.Module):
    """The first layer's input is not the model's own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(5))
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return self.layer((x - 1) * self.scale)


# (model, whether it is a chain of linear layers and known activations)
NETS = {
    "relu, frozen, no bias": (
        lambda: nn.Sequential(
            nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4).requires_grad_(False), nn.GELU(),
            nn.Linear(4, 3),
        ),
        True,
    ),
    "one layer": (lambda: nn.Linear(5, 3), True),
    "squeezed": (Squeezed, True),
    "unknown activation": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Mish(), nn.Linear(4, 3)), False),
    "norm": (lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)), False),
    "changed input": (Standardised, False),
}  # fmt: skip


@pytest.mark.parametrize("net", NETS)
def test_forward_products_of_chains_and_of_other_nets(net):
    make, is_chain = NETS[net]
    torch.manual_seed(0)
    model, (x, y) = make().double(), batch(7)
    criterion, y = (nn.MSELoss(), torch.randn(7).double()) if net == "squeezed" else (nn.CrossEntropyLoss(), y)
    tape = Tape(linear_layers(model), criterion, TapeOptions(keep_inputs=True), model)
    criterion(model(x), y).backward()
    names = {p: n for n, p in model.named_parameters() if p.requires_grad}
    local = LocalLoss(model, criterion, tape.losses, list(names), 1.0, 0, tape)
    assert [isinstance(piece, ChainLoss) for piece in local.pieces] == [is_chain]
    vectors = [[torch.randn_like(p) for p in names] for _ in range(2)]
    first, gram = local.products(vectors, Transfer())()
    jx = [
        jvp(lambda *p: functional_call(model, dict(zip(names.values(), p, strict=True)), (x,)), tuple(names), tuple(v))[1]
        for v in vectors
    ]
    top = hessian(lambda z: criterion(z, y))(model(x).detach())
    k = top.numel() ** 0.5
    j = torch.stack([t.reshape(-1) for t in jx]).detach()
    torch.testing.assert_close(gram, j @ top.reshape(int(k), int(k)) @ j.T)
    torch.testing.assert_close(
        first, torch.stack([sum((p.grad * t).sum() for p, t in zip(names, v, strict=True)) for v in vectors])
    )
    assert local.start == pytest.approx(criterion(model(x), y).item(), rel=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_subsample_stands_for_the_batch(reduction, monkeypatch):
    monkeypatch.setattr(recorded_loss, "LEAST_INSTANCES", 1)
    monkeypatch.setattr(recorded_loss, "LEAST_OUTPUTS", 1)
    model, (x, y), criterion = network(), batch(12), nn.CrossEntropyLoss(reduction=reduction)
    for offset in (0, 1, 5):
        local, parameters, _ = local_loss(model, criterion, x, y, fraction=0.25, offset=offset)
        rows = list(range(offset % 4, 12, 4))
        expected = criterion(model(x[rows]), y[rows]).item() * (4 if reduction == "sum" else 1)
        assert local.value(parameters) == pytest.approx(expected, rel=1e-12)


def test_random_layers_and_buffers_are_left_alone():
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    (x, y), criterion = batch(12), nn.CrossEntropyLoss()
    local, parameters, _ = local_loss(model, criterion, x, y)
    buffers, generator = copy.deepcopy(list(model.buffers())), torch.get_rng_state()
    values = {local.value(parameters) for _ in range(3)}
    assert len(values) == 1  # the same mask each time
    local.products([[torch.ones_like(p) for p in parameters]], Transfer())()
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
