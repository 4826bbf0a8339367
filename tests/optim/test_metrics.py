"""`metrics()` of every optimizer: plain floats under the same names at all times, which say what the state says."""

import copy
import math

import pytest
import torch
from helpers.optimizers import ALL, parameters
from helpers.training import assert_same
from torch import nn

import secondorder as so

pytestmark = pytest.mark.filterwarnings("ignore:.*no curvature covers the parameters 'shift'")

METHODS = {
    **ALL,
    "EigenAdam": lambda model, criterion, **options: so.EigenAdam(model, **options),
    "EigenAdam-pch": lambda model, criterion, **options: so.EigenAdam(model, curvature="pch-abs", criterion=criterion, **options),
    "LevenbergMarquardt": lambda model, criterion, **options: so.LevenbergMarquardt(model.parameters(), race=False, **options),
}
SHARES = {"coverage", "seen", "captured", "rejected", "updated", "damped_s", "damped_y", "skipped", "input_skipped"}


class Net(nn.Module):
    """Two linear layers and a parameter that no curvature covers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.below, self.above = nn.Linear(30, 25), nn.Linear(25, 3)
        self.shift = nn.Parameter(torch.zeros(3))
        self.double()

    def forward(self, x):
        return self.above(torch.tanh(self.below(x))) + self.shift


def batch(seed, m=20):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, 30, generator=generator).double(), torch.randn(m, 3, generator=generator).double()


def train(model, optimizer, criterion, seeds, between=lambda: None):
    for seed in seeds:
        x, y = batch(seed)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            return loss

        torch.manual_seed(seed)
        optimizer.step(closure)
        between()


def made(name, **options):
    model, criterion = Net(), nn.MSELoss()
    return model, METHODS[name](model, criterion, **options), criterion


@pytest.mark.parametrize("name", METHODS)
def test_metrics_are_floats_of_the_same_names_and_change_nothing(name):
    model, optimizer, criterion = made(name)
    before, found = optimizer.metrics(), []
    train(model, optimizer, criterion, range(7), lambda: found.append(optimizer.metrics()))
    assert optimizer.metrics() == found[-1]
    for metrics in (before, *found):
        assert metrics.keys() == before.keys() >= {"skipped_steps"}
        for key, value in metrics.items():
            assert type(value) is float
            assert math.isfinite(value)
            assert key not in SHARES or 0 <= value <= 1, key
            assert key in optimizer.metrics.__doc__
    assert found[-1] != before
    other, silent, criterion = made(name)
    train(other, silent, criterion, range(7))
    assert torch.equal(parameters(model), parameters(other))


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_optimizer_has_the_metrics_of_the_first(name):
    model, optimizer, criterion = made(name)
    train(model, optimizer, criterion, range(6))
    resumed = made(name)[1]
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(resumed.metrics(), optimizer.metrics())


@pytest.mark.parametrize("name", METHODS)
def test_skipped_steps_are_told(name):
    model, optimizer, criterion = made(name, nonfinite="skip")
    train(model, optimizer, criterion, range(2))
    with torch.no_grad():
        model.below.bias[0] = math.nan
    train(model, optimizer, criterion, [2])
    assert optimizer.metrics()["skipped_steps"] == optimizer.skipped_steps == 1


@pytest.mark.parametrize("name", [name for name in METHODS if name != "LevenbergMarquardt"])
def test_coverage_is_the_share_of_the_numbers_in_linear_layers(name):
    model, optimizer, criterion = made(name)
    train(model, optimizer, criterion, [0])
    covered = 30 * 25 + 25 + 25 * 3 + 3
    assert optimizer.metrics()["coverage"] == pytest.approx(covered / (covered + 3))


def test_eacg_tells_its_velocity_and_trace():
    model, optimizer, criterion = made("EACG", momentum=0.9)
    before = parameters(model)
    train(model, optimizer, criterion, [0])
    metrics, group = optimizer.metrics(), optimizer.param_groups[0]
    assert metrics["damping"] == group["alpha"]
    assert metrics["velocity"] == pytest.approx(float((parameters(model) - before).norm()) / group["lr"])
    hessians = [optimizer.state[layer.weight]["factors"]["bias_hessian"] for layer in (model.below, model.above)]
    assert metrics["trace"] == pytest.approx(sum(float(h.trace()) for h in hessians))


def test_layerwise_newton_tells_what_multiplies_the_step_before():
    model, optimizer, criterion = made("LayerwiseNewton", fallback="sgd")
    train(model, optimizer, criterion, [0])
    assert optimizer.metrics()["momentum"] == 0
    assert optimizer.metrics()["step_size"] > 0
    train(model, optimizer, criterion, [1])
    metrics, group = optimizer.metrics(), optimizer.param_groups[0]
    assert metrics["momentum"] != 0
    assert (metrics["damping"], metrics["ratio"]) == (group["tau"], group["rho"])


@pytest.mark.filterwarnings("ignore:secondorder. the loss of KBFGS")  # it grows a thousandfold
def test_kbfgs_tells_the_means_of_its_counts():
    model, optimizer, criterion = made("KBFGS", lr=30.0, max_increase=0.0)
    train(model, optimizer, criterion, range(5))
    counts, metrics = optimizer.diagnostics(), optimizer.metrics()
    assert counts["below"]["halvings"] > 0
    for key in ("halvings", "rejected", "updated", "damped_y"):
        assert metrics[key] == pytest.approx((counts["below"][key] + counts["above"][key]) / 10)


def test_eigen_adam_tells_what_its_bases_hold():
    model, criterion = Net(), nn.MSELoss()
    optimizer = so.EigenAdam(model, rank=3)
    x, y = batch(0)
    criterion(model(x), y).backward()
    optimizer.step()
    shares = []
    for layer in (model.below, model.above):
        state, g = optimizer.state[layer.weight], layer.bias.grad
        centred = layer.weight.grad - torch.outer(g, state["mean"])
        u, v = state["basis_out"].T, state["basis_in"].T
        outside = centred - u @ (u.T @ centred)
        outside = outside - outside @ v @ v.T
        shares.append(1 - float(outside.square().sum() / (centred.square().sum() + g.square().sum())))
    metrics = optimizer.metrics()
    assert 0 < shares[0] < 1
    assert shares[1] == pytest.approx(1)  # all of its outputs are in its basis
    assert metrics["captured"] == pytest.approx(sum(shares) / 2)
    assert metrics["rank"] == pytest.approx((3 + 3 + 3 + 3) / 4)
    assert metrics["seen"] == 1
