"""Dampings on any scale of the loss, of targets and of inputs: by the loop alone, and for the optimizers at their defaults."""

import math

import pytest
import torch
from torch import nn

import secondorder as so
from secondorder.stepping import DampingSchedule, LevenbergMarquardtLoop, QuadraticModel

pytestmark = pytest.mark.filterwarnings("ignore:secondorder")
FAMILY = [so.LayerwiseNewton, so.KFAC, so.KFRA, so.KFLR]


class Shifted:
    """f(x) = 1/2 |x|^2 + shift in float32, evaluated with the shift's rounding."""

    instances = 500

    def __init__(self, shift, here=1.0, steepness=1.0):
        self.here, self.shift, self.steepness = [torch.full((4,), here)], shift, steepness

    @property
    def start(self):
        return self.value(self.here)

    def value(self, parameters):
        (x,) = parameters
        off = (x - self.here[0]).double().square().sum()
        return float((torch.tensor(self.shift) + x.square().sum() / 2).float()) + float((self.steepness - 1) * off)

    def products(self, vectors, transfer):
        stacked = torch.stack([v[0] for v in vectors]).double()
        return lambda: (stacked @ self.here[0].double(), stacked @ stacked.T)

    def step(self, schedule, damping=None, steps=0):
        model = QuadraticModel(self, self.here, [0.0])
        directions = lambda t, f, transfer: (([-self.here[0]], None), lambda: None)  # noqa: E731
        return LevenbergMarquardtLoop(schedule).step(model, directions, None, damping, steps)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 2.0), (100.0, 102.0), (1e6, 1.0), (-1e6, 1.0), (-2.0, 1.0)])
def test_dampings_are_relative_to_the_curvature_where_the_loss_says_nothing_of_it(shift, scale):
    """f = 2 + shift, and the curvature along the gradient is 1."""
    _, _, damping = Shifted(shift).step(DampingSchedule(tau=0.1, gamma=0.2))
    assert damping.tau == pytest.approx(0.1 * scale)
    assert damping.gamma == pytest.approx(0.2 * scale)


def test_a_change_below_rounding_is_no_evidence():
    """Next to 1e8, of which float32 knows 8 units, a change of 2e-6 cannot be seen."""
    loss = Shifted(1e8, here=1e-3)
    schedule = DampingSchedule(tau=0.1, every=1)
    (delta,), _, damping = loss.step(schedule)
    torch.testing.assert_close(delta, -loss.here[0] / 1.1)
    assert damping.rho is None
    assert damping.tau == pytest.approx(0.1)
    worse = Shifted(1e8, here=1e-3, steepness=1e14)  # what is seen to be worse is not taken
    (delta,), _, damping = worse.step(schedule)
    assert delta.abs().max() < 1e-4


def test_failures_raise_the_damping_to_a_bound():
    loss, damping = Shifted(0.0, steepness=1e30), None
    for steps in range(10):
        delta, prepared, damping = loss.step(DampingSchedule(tau=0.01), damping, steps)
        assert delta[0].abs().max() == 0
        assert prepared is None
    assert 1e3 < damping.tau <= 1e4  # the curvature is 1
    loss.steepness = 1.0  # and from there a step is taken again
    delta, _, damping = loss.step(DampingSchedule(tau=0.01), damping, 10)
    assert delta[0].abs().max() > 0


def test_without_a_gradient_no_damping_is_set():
    loss = Shifted(0.0, here=0.0)
    delta, prepared, damping = loss.step(DampingSchedule(tau=0.01))
    assert delta[0].abs().max() == 0
    assert prepared is None
    assert damping is None


def regression(m=300, seed=0):
    x = torch.randn(m, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, :1] * x[:, 1:2] + x[:, 2:3].sin())


def train(optimizer, model, criterion, batches):
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("make", FAMILY)
@pytest.mark.parametrize(("deviation", "mean"), [(1.0, 0.0), (2e5, 3e5), (1.0, 1000.0)])
def test_targets_of_any_scale_are_learnt(make, deviation, mean):
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1)), nn.MSELoss()
    x, y = regression()
    optimizer = make(model, criterion, weight_decay=0.0)
    losses = train(optimizer, model, criterion, [(x, y * deviation + mean)] * 60)
    assert losses[-1] < 0.9 * deviation**2 * y.var().item()
    assert all(b <= a * (1 + 1e-5) for a, b in zip(losses, losses[1:]))
    assert math.isfinite(optimizer.param_groups[0]["tau"])


@pytest.mark.parametrize("make", [so.LayerwiseNewton, so.KFRA, so.KFLR])
def test_small_inputs_are_learnt(make):
    """Inputs of at most 0.016."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(10, 64, generator=generator)
    torch.manual_seed(0)
    model, criterion, batches = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), nn.CrossEntropyLoss(), []
    for _ in range(150):
        y = torch.randint(10, (100,), generator=generator)
        batches.append((0.01 * ((centres[y] > 0.5) + 0.6 * torch.rand(100, 64, generator=generator)), y))
    losses = train(make(model, criterion), model, criterion, batches)
    assert sum(losses[-10:]) / 10 < 1.7  # the logarithm of 10 is 2.3, and there they stay where D is 1


@pytest.mark.parametrize("make", FAMILY)
def test_after_a_first_loss_of_zero_training_goes_on(make):
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)), nn.MSELoss()
    x, y = regression()
    optimizer = make(model, criterion, weight_decay=0.0)
    before = [p.clone() for p in model.parameters()]
    assert train(optimizer, model, criterion, [(x, model(x).detach())]) == [0.0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    losses = train(optimizer, model, criterion, [(x, y)] * 20)
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("make", [so.LayerwiseNewton, so.KFAC])
def test_regression_at_small_batches_does_not_bounce(make):
    """Few rows that are far off: half of a batch of 256 would not tell of them."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model, criterion, batches = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1)), nn.MSELoss(), []
    for _ in range(150):
        x = torch.randn(256, 6, generator=generator) * torch.where(torch.rand(256, 1, generator=generator) < 0.004, 15.0, 1.0)
        batches.append((x, x[:, :1].abs() + 0.1 * torch.randn(256, 1, generator=generator)))
    losses = train(make(model, criterion), model, criterion, batches)
    late = losses[75:]
    assert max(late) < losses[0]
    assert sorted(late)[len(late) // 2] < 0.05


@pytest.mark.parametrize("make", [so.LayerwiseNewton, so.EACG, so.KBFGS, so.KBFGSL])
def test_batches_of_one_instance_are_learnt(make):
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)), nn.CrossEntropyLoss()
    x = torch.randn(80, 6)
    y = (x @ torch.randn(6, 3)).argmax(1)
    optimizer = make(model, criterion)
    for k in range(80):

        def closure(k=k):
            optimizer.zero_grad()
            loss = criterion(model(x[k : k + 1]), y[k : k + 1])
            loss.backward()
            return loss

        optimizer.step(closure)
    assert criterion(model(x), y) < 0.8 * math.log(3)
