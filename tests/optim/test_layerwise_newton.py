"""Every curvature with every solver in one optimizer; step sizes without a learning rate against explicit quadratic models."""

import copy
import io

import pytest
import torch
from helpers.newton import OPTIMIZERS, stepping
from helpers.training import assert_same, batch, network, one_step, poison_gradient, poison_input, snapshot
from oracles import dense_gauss_newton
from torch import nn
from torch.nn import functional as F

import secondorder as so
from secondorder._layers import linear_layers
from secondorder._tape import Tape, TapeOptions
from secondorder.curvature import CURVATURES
from secondorder.solvers import SOLVERS
from secondorder.stepping import DampingSchedule, LossTrend, QuadraticModel


@pytest.mark.parametrize("lr", [0.05, None])
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_curvature_with_every_solver(solver, curvature, lr):
    model, criterion, (x, y) = network(), nn.CrossEntropyLoss(), batch(30)
    optimizer = stepping(model, criterion, lr, curvature=curvature, solver=solver, inverse_every=2)
    losses = [one_step(model, criterion, optimizer, x, y) for _ in range(6)]
    assert losses[-1] < losses[0]


def test_an_exact_step_with_momentum_decay_and_averages():
    model, criterion = network(), nn.CrossEntropyLoss()
    kwargs = {"alpha": 0.1, "momentum": 0.7, "weight_decay": 0.2, "factor_decay": 0.5, "max_step": None}
    optimizer = so.EACG(model, criterion, lr=0.3, solver="exact", curvature="kflr", **kwargs)
    average, velocity = {}, {}
    for step in (1, 2, 3):
        x, y = batch(seed=step)
        old = copy.deepcopy(model)
        tape = Tape(linear_layers(old), criterion, TapeOptions(columns=CURVATURES["kflr"].columns))
        criterion(old(x), y).backward()
        records = {r.layer: r for r in tape.records()}
        tape.remove()
        one_step(model, criterion, optimizer, x, y)
        for i in (0, 2, 4):
            layer, record = old[i], records[old[i]]
            new = (record.block, record.input().T @ record.input() / len(x))
            average[i] = [0.5 * a + 0.5 * n for a, n in zip(average.get(i, (0, 0)), new, strict=True)]
            h, a = (f / (1 - 0.5**step) for f in average[i])
            matrix = 0.9 * torch.kron(h, a) + 0.1 * torch.eye(layer.weight.numel()).double()
            p = torch.linalg.solve(matrix, -layer.weight.grad.reshape(-1)).reshape(layer.weight.shape)
            velocity[i] = 0.7 * velocity.get(i, 0) + p
            expected = (1 - 0.3 * 0.2) * layer.weight + 0.3 * velocity[i]
            torch.testing.assert_close(model[i].weight, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dict_resumes_to_the_bit(name):
    criterion = nn.CrossEntropyLoss()

    def run(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            one_step(model, criterion, optimizer, *batch(seed=step))

    straight = network().float()
    run_float = lambda o, m, steps: run(m, o, steps)  # noqa: E731
    straight.register_forward_pre_hook(lambda m, args: (args[0].float(),))
    run_float(OPTIMIZERS[name](straight, criterion), straight, range(8))
    for stop in (1, 4):
        first = network().float()
        first.register_forward_pre_hook(lambda m, args: (args[0].float(),))
        optimizer = OPTIMIZERS[name](first, criterion)
        run(first, optimizer, range(stop))
        file = io.BytesIO()
        torch.save((first.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        model_state, optimizer_state = torch.load(file, weights_only=True)
        second = network().float()
        second.register_forward_pre_hook(lambda m, args: (args[0].float(),))
        second.load_state_dict(model_state)
        resumed = OPTIMIZERS[name](second, criterion)
        resumed.load_state_dict(optimizer_state)
        run(second, resumed, range(stop, 8))
        assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))


def test_the_first_step_without_a_learning_rate_is_the_explicit_minimum():
    model, (x, y), criterion = network(), batch(20), nn.CrossEntropyLoss()
    optimizer = so.LayerwiseNewton(model, criterion, subsample=1.0, damping=0.05, solver="exact", weight_decay=0.01)
    old = copy.deepcopy(model)
    loss = one_step(model, criterion, optimizer, x, y)
    group = optimizer.param_groups[0]
    moved = torch.cat([(a - b).detach().reshape(-1) for a, b in zip(model.parameters(), old.parameters(), strict=True)])
    theta = torch.cat([p.detach().reshape(-1) for p in old.parameters()])
    gradients = torch.autograd.grad(criterion(old(x), y), list(old.parameters()))
    g = torch.cat([t.reshape(-1) for t in gradients]) + 0.01 * theta
    tau = 0.05 * loss
    c = dense_gauss_newton(old, criterion, x, y) + (tau + 0.01) * torch.eye(len(g)).double()
    # Along the direction taken the model has its minimum at the step taken.
    assert float(moved @ g + moved @ c @ moved) == pytest.approx(0, abs=1e-10)
    change = criterion(model(x), y).item() - loss + 0.005 * float((theta + moved).square().sum() - theta.square().sum())
    assert group["rho"] == pytest.approx(change / float(moved @ g + moved @ c @ moved / 2), rel=1e-6)
    assert group["tau"] == pytest.approx(DampingSchedule(1.0, every=1).adapted(tau, group["rho"]))


def test_levenberg_marquardt():
    rule = DampingSchedule(tau=1.0, omega=0.9, every=2)
    assert [rule.adapted(2.0, rho) for rho in (0.9, 0.5, 0.1, -3.0)] == pytest.approx([2 * 0.81, 2, 2 / 0.81, 2 / 0.81])


class Fence(nn.Module):
    """Cross-entropy that is `beyond` wherever the outputs are not those of the recorded forward pass."""

    def __init__(self, beyond):
        super().__init__()
        self.beyond, self.seen = beyond, None

    def forward(self, z, y):
        if torch.is_grad_enabled() and z.grad_fn is not None and self.seen is None:
            self.seen = z.detach().clone()
        loss = F.cross_entropy(z, y)
        return loss if torch.allclose(z.detach(), self.seen, atol=1e-12) else loss + self.beyond


@pytest.mark.parametrize("beyond", [float("nan"), float("inf"), 10.0])
@pytest.mark.parametrize("make", [lambda m, c: so.LayerwiseNewton(m, c, subsample=1.0), lambda m, c: so.KFRA(m, c)])
def test_a_step_that_fails_its_check_is_taken_back(make, beyond):
    model, (x, y), criterion = network(), batch(), Fence(beyond)
    optimizer, old = make(model, criterion), copy.deepcopy(model.state_dict())
    loss = one_step(model, criterion, optimizer, x, y)
    assert all(torch.equal(p, old[n]) for n, p in model.state_dict().items())
    assert optimizer.param_groups[0]["tau"] > 100 * 0.001 * loss
    criterion.beyond = 0.0
    assert one_step(model, criterion, optimizer, x, y) == loss
    assert not torch.equal(model[0].weight, old["0.weight"])


@pytest.mark.parametrize("poison", [poison_input, poison_gradient])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_numbers_that_are_not_finite_change_nothing(name, poison):
    model, (x, y), criterion = network(), batch(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    one_step(model, criterion, optimizer, x, y)
    good = copy.deepcopy(model.state_dict())
    poison(model, x)
    before = snapshot(model, optimizer)
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)nan or inf|not finite"):
        one_step(model, criterion, optimizer, x, y)
    assert_same(snapshot(model, optimizer), before)
    if model[0].weight._backward_hooks:
        model[0].weight._backward_hooks.clear()
    model.load_state_dict(good)
    one_step(model, criterion, optimizer, *batch())


def test_averaged_parameters():
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = so.LayerwiseNewton(model, criterion, average=True)
    average, own = None, None
    for t in range(1, 30):
        one_step(model, criterion, optimizer, *batch(seed=t))
        beta, own = min(0.95, 1 - 1 / t), model[0].weight.detach().clone()
        average = own if t == 1 else beta * average + (1 - beta) * own
    with optimizer.averaged_parameters():
        torch.testing.assert_close(model[0].weight.detach(), average)
    assert torch.equal(model[0].weight, own)
    with (
        pytest.raises(RuntimeError, match="expected an optimizer made with average=True"),
        so.LayerwiseNewton(model, criterion).averaged_parameters(),
    ):
        pass


def test_parameters_without_curvature_move_too():
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()
    criterion, (x, y) = nn.CrossEntropyLoss(), batch(30)
    optimizer, old = so.LayerwiseNewton(model, criterion), copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="not elementwise|no curvature covers"):
        losses = [one_step(model, criterion, optimizer, x, y) for _ in range(20)]
    assert all(not torch.equal(p, old[n]) for n, p in model.state_dict().items())
    assert losses[-1] < losses[0] / 2


def test_micro_batches_without_a_learning_rate_are_one_batch():
    criterion, (x, y) = nn.CrossEntropyLoss(), batch(12)
    models = [network(), network()]
    optimizers = [so.LayerwiseNewton(model, criterion, subsample=1.0) for model in models]
    for _ in range(3):
        one_step(models[0], criterion, optimizers[0], x, y)
        optimizers[1].zero_grad()
        for i in (0, 4, 8):
            (criterion(models[1](x[i : i + 4]), y[i : i + 4]) / 3).backward()
        optimizers[1].step()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b)


def test_the_solvers_own_damping_is_the_best_of_three_under_the_model(monkeypatch):
    proposals, best_step = [], QuadraticModel.best_step

    def recorded(*args):
        step = best_step(*args)()
        proposals.append(step)
        return lambda: step

    monkeypatch.setattr(QuadraticModel, "best_step", recorded)
    model, criterion, chosen = network(), nn.CrossEntropyLoss(), []
    optimizer, factor = so.KFRA(model, criterion), 0.95**20
    for t in range(60):
        proposals.clear()
        gamma, (x, y) = optimizer.param_groups[0]["gamma"], batch(40, seed=t)
        loss = one_step(model, criterion, optimizer, x, y)
        if t % 20 == 19:
            assert len(proposals) == 3
            best = min(range(3), key=lambda k: proposals[k].predicted)
            assert optimizer.param_groups[0]["gamma"] == pytest.approx(gamma * [1, factor, 1 / factor][best])
            chosen.append(best)
        else:
            assert optimizer.param_groups[0]["gamma"] == pytest.approx(0.01 * loss if gamma is None else gamma)
    assert set(chosen) != {0}


@pytest.mark.parametrize("name", ["KFAC", "KFRA", "KFLR", "LayerwiseNewton"])
def test_the_family_trains(name):
    torch.manual_seed(1)
    model, criterion = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)), nn.CrossEntropyLoss()
    x = torch.rand(200, 2) * 2 - 1
    y = (x[:, 0] * x[:, 1] > 0).long()
    optimizer = OPTIMIZERS[name](model, criterion)
    losses = [one_step(model, criterion, optimizer, x, y) for _ in range(100)]
    assert losses[-1] < losses[0] / 3


def test_curvature_samples_choose_the_rows_of_the_second_moment_alone():
    (x, y), criterion = batch(30), nn.CrossEntropyLoss()
    rows = [k * 30 // 8 for k in range(8)]
    for solver, name, expected in [
        ("kfi", "input_second_moment", x[rows].T @ x[rows] / 8),
        ("ea-cg", "mean_input", x.mean(0)),
        ("ea-isotropic", "mean_square_input", x.square().sum(1).mean()),
    ]:
        model = network()
        optimizer = so.EACG(model, criterion, lr=0.1, solver=solver, alpha=0.1, inverse_every=2, curvature_samples=8)
        one_step(model, criterion, optimizer, x, y)
        torch.testing.assert_close(optimizer.state[model[0].weight]["factors"][name], expected)


@pytest.mark.parametrize(
    "kwargs", [{"curvature_samples": 0}, {"inverse_every": 0}, {"max_factor_elements": -1}, {"damping": 0.0}, {"subsample": 0.0}]
)
def test_bad_arguments(kwargs):
    (name,) = kwargs
    with pytest.raises(ValueError, match=f"LayerwiseNewton: expected {name} "):
        so.LayerwiseNewton(network(), nn.CrossEntropyLoss(), **kwargs)


@pytest.mark.parametrize(("make", "name"), [(so.KFAC, "tau"), (so.KFRA, "tau"), (so.KFRA, "gamma"), (so.KFLR, "gamma")])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_dampings_are_named_as_they_were_given(make, name, value):
    with pytest.raises(ValueError, match=f"{make.__name__}: expected {name} > 0, got"):
        make(network(), nn.CrossEntropyLoss(), **{name: value})


def mixture_of_two_classifiers(h, y):
    """-log p(y | h) of Botev et al., Eq. 27, which is not convex in h."""
    first, second = (torch.where(y > 0, F.logsigmoid(h[:, k]), F.logsigmoid(-h[:, k])) for k in (1, 2))
    return -torch.logaddexp(F.logsigmoid(h[:, 0]) + first, F.logsigmoid(-h[:, 0]) + second).mean()


@pytest.mark.parametrize("make", [so.KFRA, so.LayerwiseNewton])
def test_a_mixture_model_trains(make):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.rand(200, 2) * 2 - 1
    y = (x[:, 0] * x[:, 1] > 0).long()
    optimizer = make(model, mixture_of_two_classifiers, curvature="pch-abs")
    losses = [one_step(model, optimizer.criterion, optimizer, x, y) for _ in range(60)]
    assert losses[-1] < losses[0] / 3


def test_the_trend_raises_the_floor_where_losses_rise():
    trend, tau, floors = LossTrend(1.0, 1.0, 5.0, 5.0), 2.0, []
    for loss in (4.0, 3.0, 2.0, 2.0, 9.0, 9.0):
        trend, rising = trend.seen(loss, tau)
        floors.append((trend.floor, rising))
    # 0.7 short + 0.3 loss: 4.7, 4.19, 3.533, 3.073, 4.851, 6.096; 0.95 long + 0.05 loss: 4.95, 4.853, 4.71, 4.574, 4.796, 5.006
    assert floors == [(1.0, False)] * 5 + [(8.0, True)]
    assert trend.long == trend.short == pytest.approx(6.0957, rel=1e-3)
    assert trend.seen(5.0, tau)[0].floor == pytest.approx(7.92)
    for _ in range(20):  # it keeps rising: the floor stays within bounds
        trend, _ = trend.seen(10 * trend.short, 1e6)
    assert trend.floor == 400.0
    # A loss below zero may rise, too.
    assert LossTrend(1.0, 1.0, -5.0, -5.0).seen(-1.0, tau)[1]


def test_damping_starts_by_the_number_of_instances():
    rule = DampingSchedule(None)
    assert [rule.start(m) for m in (1, 10, 50, 500, 10_000)] == pytest.approx([1, 1, 0.1, 0.001, 1e-4])
    assert DampingSchedule(0.3).start(500) == 0.3
    criterion, models = nn.CrossEntropyLoss(), [network(), network()]
    taus = []
    for model, pieces in zip(models, ([slice(0, 40)], [slice(0, 10), slice(10, 40)]), strict=True):
        optimizer, (x, y) = so.LayerwiseNewton(model, criterion), batch(40)
        for rows in pieces:
            (criterion(model(x[rows]), y[rows]) * len(y[rows]) / 40).backward()
        optimizer.step()
        taus.append(optimizer.param_groups[0]["loss_trend"][0] / optimizer.param_groups[0]["loss_trend"][2])
    assert taus == pytest.approx([0.1 * 250 / 40**2] * 2)


@pytest.mark.parametrize("name", ["EACG", "LayerwiseNewton", "KFRA", "KFLR", "KFAC"])
def test_an_input_that_is_overwritten_before_the_step_is_an_error(name):
    model, criterion, (x, y) = network(), nn.CrossEntropyLoss(), batch(8)
    optimizer, buffer = getattr(so, name)(model, criterion), torch.empty(4, 5).double()
    before = copy.deepcopy(model.state_dict())
    for part in (slice(4), slice(4, 8)):
        buffer.copy_(x[part])
        (criterion(model(buffer), y[part]) / 2).backward()
    with pytest.raises(RuntimeError, match="layer '0'.*give each micro-batch a tensor of its own"):
        optimizer.step()
    assert_same(before, model.state_dict())
    optimizer.zero_grad()
    buffer.copy_(x[:4])  # one fill a step is no fault
    criterion(model(buffer), y[:4]).backward()
    optimizer.step()
