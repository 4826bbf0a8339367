import copy

import pytest
import torch
from oracles import hessian_block, linear_names, pch_by_loops
from test_curvature import CRITERIA, network
from torch import nn

import secondorder as so
from secondorder.curvature import PCH


@pytest.mark.parametrize("criterion_name", ["cross-entropy", "eq14"])
def test_errors_are_those_of_the_dense_blocks(criterion_name):
    criterion, target = CRITERIA[criterion_name]
    model, x, y = network([4, 6, 5, 3], nn.Sigmoid()), torch.randn(7, 4).double(), target(7, 3)
    with torch.no_grad():
        model[-1].weight *= 10  # so that Eq. 14's Hessian has negative eigenvalues
    table = so.diagnostics.curvature_error(model, criterion, x, y, ["pch-abs", PCH(0.0), "gauss-newton"])
    linears = [layer for layer in model if isinstance(layer, nn.Linear)]
    for name, gamma in (("pch-abs", -1.0), ("PCH(gamma=0.0)", 0.0)):
        blocks = pch_by_loops(
            [layer.weight.detach() for layer in linears],
            [layer.bias.detach() for layer in linears],
            [torch.sigmoid] * 2,
            lambda z, i: criterion(z[None], y[i : i + 1]) / 7,
            x,
            gamma,
        )
        squares = 0
        for layer, block in zip(linear_names(model), blocks, strict=True):
            values, vectors = torch.linalg.eigh(hessian_block(model, criterion, x, y, f"{layer}.bias"))
            distance = float((block - vectors @ torch.diag(values.abs()) @ vectors.T).square().sum().sqrt())
            assert table.errors[name][layer] == pytest.approx(distance, rel=1e-8, abs=1e-12)
            squares += distance**2
        assert table.totals[name] == pytest.approx(squares**0.5)
    assert (table.errors["gauss-newton"] is None) == (criterion_name == "eq14")
    lines = str(table).splitlines()
    assert len(lines) == 5
    assert lines[-1].split()[0] == "total"
    assert float(lines[1].split()[1]) == pytest.approx(table.errors["pch-abs"]["0"], rel=1e-3)


def test_the_model_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    x, y, criterion = torch.randn(7, 4).double(), torch.randint(3, (7,)), nn.CrossEntropyLoss()
    criterion(model(x), y).backward()
    before, gradients = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    so.diagnostics.curvature_error(model, criterion, x, y, ["pch-abs", "kflr"])
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert not any(m._forward_hooks for m in [*model.modules(), criterion])
