"""Degenerate nets, overflow and matrices that Cholesky cannot factorise, for every curvature and solver."""

from itertools import cycle, islice

import pytest
import torch
from helpers.newton import OPTIMIZERS, stepping
from helpers.training import assert_same, batch, network, one_step, snapshot
from torch import nn

import secondorder as so
from secondorder.curvature import CURVATURES
from secondorder.solvers import SOLVERS


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("case", ["dead units", "constant input", "one sample", "one input"])
def test_degenerate_nets(name, case):
    torch.manual_seed(0)
    n_in, m = (1 if case == "one input" else 5), (1 if case == "one sample" else 9)
    model = nn.Sequential(nn.Linear(n_in, 6), nn.ReLU(), nn.Linear(6, 3))
    if case == "dead units":
        nn.init.constant_(model[0].bias, -100.0)
    x, y = torch.ones(m, n_in) if case == "constant input" else torch.randn(m, n_in), torch.randint(3, (m,))
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    losses = [one_step(model, criterion, optimizer, x, y) for _ in range(5)]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert losses[-1] < losses[0]


# Every solver and every curvature at least once.
PAIRS = list(islice(zip(cycle(SOLVERS), cycle(CURVATURES)), max(len(SOLVERS), len(CURVATURES))))


@pytest.mark.parametrize("case", ["dead units", "constant input", "zero input", "one sample", "one input", "zero net"])
@pytest.mark.parametrize(
    "kwargs",
    [{"lr": None, "damping": 1e-12}, {"lr": None, "damping": 1e12}, {"lr": 1e-3, "alpha": 1e-6}, {"lr": 1e-3, "alpha": 1 - 1e-7}],
)
def test_degenerate_nets_with_tiny_and_huge_damping(kwargs, case):
    criterion = nn.CrossEntropyLoss()
    for solver, curvature in PAIRS:
        torch.manual_seed(0)
        n_in, m = (1 if case == "one input" else 5), (1 if case == "one sample" else 9)
        model = nn.Sequential(nn.Linear(n_in, 6), nn.ReLU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
        x, y = torch.randn(m, n_in), torch.randint(3, (m,))
        if case == "dead units":
            nn.init.constant_(model[0].bias, -100.0)
        if case == "zero net":
            for p in model.parameters():
                nn.init.zeros_(p)
        if case.endswith(" input") and case != "one input":
            x = torch.full_like(x, case == "constant input")
        optimizer = stepping(model, criterion, curvature=curvature, solver=solver, **kwargs)
        losses = [one_step(model, criterion, optimizer, x, y) for _ in range(4)]
        assert all(torch.isfinite(p).all() for p in model.parameters()), (solver, curvature)
        if kwargs["lr"] is None:
            assert losses[-1] <= losses[0] * (1 + 1e-6), (solver, curvature)


# solver -> what of an input of 1e25 is no float32; its gradient is 0, since the units are saturated
OVERFLOWS = {
    "kron-cg": "input second moment", "kfi": "input second moment", "exact": "input second moment", "auto": "input second moment",
    "ea-isotropic": "mean square input",
}  # fmt: skip


@pytest.mark.parametrize("lr", [0.01, None])
@pytest.mark.parametrize("solver", SOLVERS)
def test_overflowing_inputs_name_the_layer_and_the_factor(solver, lr):
    model, criterion = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), nn.CrossEntropyLoss()
    optimizer, (x, y) = (
        stepping(model, criterion, lr, solver=solver),
        (torch.full((3, 4), 1e25), torch.arange(3) % 2),
    )
    before = snapshot(model, optimizer)
    factor = OVERFLOWS.get(solver, "mean input")  # whose square overflows
    with pytest.raises(so.NonFiniteError, match=f"layer '0': NaN or inf in its {factor}.*No parameter and no state"):
        one_step(model, criterion, optimizer, x, y)
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize("lr", [0.01, None])
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_overflowing_curvature_names_the_layer_and_the_factor(solver, curvature, lr):
    model, criterion = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), nn.MSELoss()
    with torch.no_grad():
        model[2].weight.fill_(1e20)  # W^T H W and delta delta^T are no float32
    optimizer = stepping(model, criterion, lr, curvature=curvature, solver=solver)
    x = 1e-18 * torch.randn(3, 4)
    with torch.no_grad():
        model[0].bias.zero_()
        y = model(x) + 1
    before = snapshot(model, optimizer)
    with pytest.raises(so.NonFiniteError, match="layer '0': NaN or inf in its bias Hessian.*No parameter and no state"):
        one_step(model, criterion, optimizer, x, y)
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize("lr", [None, 0.1])
def test_what_cholesky_cannot_factorise_is_inverted_otherwise(lr, monkeypatch):
    """Which is known once the quadratic model is: the step is that of the true inverses."""

    def failing(matrix):
        return torch.eye(matrix.shape[-1]).to(matrix).expand(matrix.shape), torch.ones(matrix.shape[:-2], dtype=torch.int32)

    moved = []
    for fails in (False, True):
        model, criterion = network(), nn.CrossEntropyLoss()
        optimizer = stepping(model, criterion, lr, solver="kfi")
        with monkeypatch.context() as patch:
            if fails:
                patch.setattr(torch.linalg, "cholesky_ex", failing)
            one_step(model, criterion, optimizer, *batch(20))
        moved.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*moved)


def test_small_noisy_batches_do_not_diverge():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Dropout(0.3), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 3))
    criterion, teacher = nn.CrossEntropyLoss(), torch.randn(6, 3)
    optimizer, losses = so.LayerwiseNewton(model, criterion), []
    for _ in range(300):
        x = torch.randn(16, 6)
        losses.append(one_step(model, criterion, optimizer, x, (x @ teacher).argmax(1)))
    assert sum(losses[-50:]) / 50 < 0.6
