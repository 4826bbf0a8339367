"""What users of torch's optimizers expect of LevenbergMarquardt: states, copies, schedulers, frozen parameters, errors."""

import copy
import math
import pickle

import pytest
import torch
import torch.utils.checkpoint
from helpers.least_squares import flat, float64, noisy, poisson, regression  # noqa: F401
from torch import nn
from torch.nn.functional import mse_loss

import secondorder as so
from secondorder.stepping import race


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path):
    net, loss = poisson()
    optimizer = so.LevenbergMarquardt(net.parameters(), rows=30)
    for _ in range(3):
        optimizer.step(loss)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    for _ in range(5):
        optimizer.step(loss)
    expected = flat(net)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    again = so.LevenbergMarquardt(net.parameters(), rows=30)
    net.load_state_dict(saved["net"])
    again.load_state_dict(saved["optimizer"])
    for _ in range(5):
        again.step(loss)
    torch.testing.assert_close(flat(net), expected, rtol=0, atol=0)


def test_a_foreign_state_is_refused():
    net, x, y = regression()
    adam = torch.optim.Adam(net.parameters())
    mse_loss(net(x), y).backward()
    adam.step()
    with pytest.raises(ValueError, match="expected a state with"):
        so.LevenbergMarquardt(net.parameters()).load_state_dict(adam.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_model_and_optimizer_train_alike(copied):
    net, x, y = regression()
    optimizer = so.LevenbergMarquardt(net.parameters(), rows=20)
    optimizer.step(lambda: mse_loss(net(x), y))
    other, theirs = copied((net, optimizer))
    for _ in range(3):
        optimizer.step(lambda: mse_loss(net(x), y))
        theirs.step(lambda: mse_loss(other(x), y))
    torch.testing.assert_close(flat(other), flat(net), rtol=0, atol=0)


def test_lr_multiplies_the_step_and_its_square_the_acceleration():
    net, x, y = regression()
    before, moves = flat(net), {}
    for lr in (0.5, 1.0, 1.5):
        model = copy.deepcopy(net)
        so.LevenbergMarquardt(model.parameters(), lr=lr, race=False, damping=10.0).step(lambda model=model: mse_loss(model(x), y))
        moves[lr] = flat(model) - before
    # With lr d + lr^2 b, d and b from two of them give the third.
    b = 2 * moves[1.0] - 4 * moves[0.5]
    d = moves[1.0] - b
    torch.testing.assert_close(moves[1.5], 1.5 * d + 2.25 * b, rtol=1e-6, atol=1e-9)
    assert b.norm() > 1e-3 * d.norm()


def test_lr_multiplies_the_step_of_its_group_and_schedulers_change_it():
    net, x, y = regression()
    before = flat(net)

    def moved(params, lr):
        model = copy.deepcopy(net)
        params = params(model)
        optimizer = so.LevenbergMarquardt(params, lr=lr, race=False, acceleration=False, damping=10.0)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=1)
        optimizer.step(lambda: mse_loss(model(x), y))
        scheduler.step()
        return flat(model) - before

    whole = moved(lambda m: m.parameters(), 1.0)
    torch.testing.assert_close(moved(lambda m: m.parameters(), 0.5), whole / 2)
    halves = moved(lambda m: [{"params": m[0].parameters(), "lr": 1.0}, {"params": m[2].parameters()}], 0.5)
    n = sum(p.numel() for p in net[0].parameters())
    torch.testing.assert_close(halves[:n], whole[:n])
    torch.testing.assert_close(halves[n:], whole[n:] / 2)


def test_frozen_parameters_stay_and_may_be_unfrozen():
    net, x, y = regression(40, 12)
    net[0].requires_grad_(False)
    optimizer = so.LevenbergMarquardt(net.parameters())
    first = net[0].weight.detach().clone()
    for _ in range(3):
        optimizer.step(lambda: mse_loss(net(x), y))
    assert torch.equal(net[0].weight, first)
    frozen = mse_loss(net(x), y).item()
    net[0].requires_grad_(True)
    for _ in range(30):
        optimizer.step(lambda: mse_loss(net(x), y))
    assert mse_loss(net(x), y).item() < 0.1 * frozen
    net.requires_grad_(False)
    with pytest.raises(RuntimeError, match="requires a gradient"):
        optimizer.step(lambda: mse_loss(net(x), y))


def last_norm():
    """A net whose last node takes two parameters."""
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3), nn.LayerNorm(3)), torch.randn(40, 2), torch.randn(40, 3)


def test_parameters_of_one_node_may_be_frozen_and_unfrozen():
    """With them the graph's nodes stay the same, and what is known of the graph does not hold."""
    net, x, y = last_norm()
    optimizer = so.LevenbergMarquardt(net.parameters(), race=False)
    for frozen in ([net[3].weight], [], [net[3].bias], [net[3].weight, net[3].bias], []):
        net.requires_grad_(True)
        for p in frozen:
            p.requires_grad_(False)
        for _ in range(3):
            before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
            optimizer.step(lambda: mse_loss(net(x), y))
            after = flat(net)
        again = so.LevenbergMarquardt(net.parameters(), race=False)  # it knows nothing of graphs
        net.load_state_dict(before[0])
        again.load_state_dict(before[1])
        again.step(lambda: mse_loss(net(x), y))
        torch.testing.assert_close(flat(net), after, rtol=1e-12, atol=1e-14)


def test_a_learning_rate_of_zero_moves_nothing():
    """As the first one of a warm-up by a scheduler, or the last one of an annealing."""
    net, x, y = regression()
    optimizer, before, calls = so.LevenbergMarquardt(net.parameters()), flat(net), []
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: float(k == 1))

    def closure():
        calls.append(1)
        return mse_loss(net(x), y)

    first = optimizer.step(closure)
    assert first == mse_loss(net(x), y)
    assert torch.equal(flat(net), before) and len(calls) == 1 and not optimizer.state
    scheduler.step()
    optimizer.step(closure)
    moved, state = flat(net), str(optimizer.state_dict()["state"])
    assert not torch.equal(moved, before)
    scheduler.step()
    optimizer.step(closure)
    assert torch.equal(flat(net), moved) and str(optimizer.state_dict()["state"]) == state


@pytest.mark.parametrize("lr", [math.nan, -1.0, 2.0])
def test_a_learning_rate_out_of_range_is_refused_at_every_step(lr):
    net, x, y = regression()
    optimizer, before = so.LevenbergMarquardt(net.parameters(), lr=0.0), flat(net)
    optimizer.step(lambda: mse_loss(net(x), y))
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match=r"LevenbergMarquardt.step\(\): expected lr in \[0, 2\), got"):
        optimizer.step(lambda: mse_loss(net(x), y))
    assert torch.equal(flat(net), before) and not optimizer.state


def test_a_first_group_may_be_empty():
    net, x, y = regression()
    nets = net, copy.deepcopy(net)
    groups = [{"params": []}, {"params": nets[0].parameters()}]
    for net, params in zip(nets, (groups, nets[1].parameters()), strict=True):
        optimizer = so.LevenbergMarquardt(params, race=False)
        optimizer.step(lambda net=net: mse_loss(net(x), y))
        assert optimizer.metrics()["damping"] > 0
    assert torch.equal(*map(flat, nets))


def test_a_group_whose_learning_rate_is_zero_is_frozen():
    net, x, y = regression()
    other, first = copy.deepcopy(net), flat(net[0])
    other[0].requires_grad_(False)
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters()}]
    optimizer, frozen = so.LevenbergMarquardt(groups, race=False), so.LevenbergMarquardt(other.parameters(), race=False)
    optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(3):
        optimizer.step(lambda: mse_loss(net(x), y))
        frozen.step(lambda: mse_loss(other(x), y))
    assert torch.equal(flat(net[0]), first)
    torch.testing.assert_close(flat(net), flat(other))


@pytest.mark.parametrize("resumed", [False, True])
def test_what_is_held_out_does_not_lead_other_parameters_back(resumed):
    """Two layers of one size are trained in turn: the record of one says nothing of the other, also after a checkpoint."""
    layers = [nn.Linear(2, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 1)]
    net = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2], nn.Tanh(), layers[3])
    x = torch.rand(300, 2)
    y = torch.sin(3 * x[:, :1]) + 0.3 * torch.randn(300, 1)
    optimizer = so.LevenbergMarquardt(net.parameters(), holdout=True, race=False)
    net.requires_grad_(False)
    layers[1].requires_grad_(True)
    for _ in range(3):
        optimizer.step(lambda: mse_loss(net(x), y))
    state = optimizer.state[layers[0].weight]
    record = state["best"].clone()
    torch.testing.assert_close(record, flat(layers[1]))
    state["held"] = 0.0  # no later step comes below this record
    layers[1].requires_grad_(False)
    layers[2].requires_grad_(True)
    if resumed:
        saved = optimizer.state_dict()
        optimizer = so.LevenbergMarquardt(net.parameters(), holdout=True, race=False)
        optimizer.load_state_dict(saved)
    optimizer.step(lambda: mse_loss(net(x), y))
    torch.testing.assert_close(optimizer.state[layers[0].weight]["best"], flat(layers[2]))


def test_what_is_held_out_begins_anew_with_other_parameters():
    net, loss, _ = noisy()
    net[0].requires_grad_(False)
    optimizer = so.LevenbergMarquardt(net.parameters(), holdout=True, race=False)
    for _ in range(3):
        optimizer.step(loss)
    frozen = len(optimizer.state[net[0].weight]["best"])
    net[0].requires_grad_(True)
    optimizer.step(loss)
    assert len(optimizer.state[net[0].weight]["best"]) == frozen + 60


@pytest.mark.parametrize("nonfinite", ["error", "skip"])
def test_what_is_not_finite_changes_nothing(nonfinite):
    net, x, y = regression()
    optimizer = so.LevenbergMarquardt(net.parameters(), nonfinite=nonfinite)
    optimizer.step(lambda: mse_loss(net(x), y))
    before, state = flat(net), copy.deepcopy(optimizer.state_dict()["state"])
    bad = y.clone()
    bad[3] = float("inf")
    if nonfinite == "error":
        with pytest.raises(so.NonFiniteError, match="the loss is inf"):
            optimizer.step(lambda: mse_loss(net(x), bad))
    else:
        assert float(optimizer.step(lambda: mse_loss(net(x), bad))) == float("inf")
        assert optimizer.skipped_steps == 1
    torch.testing.assert_close(flat(net), before, rtol=0, atol=0)
    assert str(optimizer.state_dict()["state"]) == str(state)
    optimizer.step(lambda: mse_loss(net(x), y))


@pytest.mark.parametrize(
    "loss", [lambda u, y: torch.nanmean((u - y) ** 2), lambda u, y: mse_loss(u, y, reduction="none")[y.isfinite()].mean()]
)
def test_targets_that_are_left_out_after_they_are_squared_are_refused(loss):
    net, x, y = regression()
    y[3] = float("nan")
    before = flat(net)
    with pytest.raises(so.NonFiniteError, match=r"LevenbergMarquardt.step\(\): a residual is NaN .* before it is squared"):
        so.LevenbergMarquardt(net.parameters()).step(lambda: loss(net(x), y))
    optimizer = so.LevenbergMarquardt(net.parameters(), nonfinite="skip")
    assert torch.isfinite(optimizer.step(lambda: loss(net(x), y)))
    assert optimizer.skipped_steps == 1
    torch.testing.assert_close(flat(net), before, rtol=0, atol=0)


def test_a_warm_start_that_ends_where_the_loss_is_not_finite_is_left_out():
    """As the steps of the first-order optimizer may, beyond the domain of a root or a logarithm."""
    k, x = nn.Parameter(torch.tensor([0.01])), torch.linspace(0.1, 1, 40)
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = so.LevenbergMarquardt([k, *net.parameters()])

    def closure():
        return ((k.sqrt() * x - 0.01 * x) ** 2).mean() + 1e-4 * mse_loss(net(x.unsqueeze(1))[:, 0], x)

    losses = [float(optimizer.step(closure)) for _ in range(6)]
    assert losses[-1] < 1e-2 * losses[0]
    assert torch.isfinite(flat(net)).all() and k.item() > 0


def test_another_default_device_changes_nothing():
    """Such as that of scripts that begin by torch.set_default_device("cuda")."""
    ends = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        net, loss, _ = noisy()
        optimizer = so.LevenbergMarquardt(net.parameters(), rows=50, holdout=True, solver="nystrom")
        with torch.device(device):
            for _ in range(3):
                optimizer.step(lambda loss=loss, net=net: loss() + (2 * net[0].weight.norm() / 3) ** 2)
        ends.append(flat(net))
    assert torch.equal(*ends)


@pytest.mark.parametrize("rows", [10, None])
def test_terms_without_residuals_and_parameters_without_numbers_count_for_nothing(rows):
    """As a batch may have none of the points that are known."""
    net, x, y = regression()
    other, none = copy.deepcopy(net), nn.Parameter(torch.zeros(0))
    first = so.LevenbergMarquardt(net.parameters(), rows=rows)
    second = so.LevenbergMarquardt([*other.parameters(), none], rows=rows)
    for _ in range(3):
        first.step(lambda: mse_loss(net(x), y))
        second.step(lambda: ((other(x[:0]) + none.sum()) ** 2).sum() + mse_loss(other(x) + none.sum(), y))
    assert torch.equal(flat(net), flat(other))


@pytest.mark.parametrize("kept", [torch.autograd.graph.save_on_cpu, None])
def test_losses_within_a_checkpoint_or_on_another_device_are_those_without(kept):
    net, x, y = regression()
    ends = []
    for hooked in (False, True):
        model = copy.deepcopy(net)

        def loss(x, model=model):
            return mse_loss(model(x), y) + 0.1 * sum((p**2).sum() for p in model.parameters())

        def closure(loss=loss, hooked=hooked):
            if not hooked:
                return loss(x)
            if kept is None:
                return torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False)
            with kept():
                return loss(x)

        optimizer = so.LevenbergMarquardt(model.parameters(), race=False)
        for _ in range(3):
            optimizer.step(closure)
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_a_step_without_any_gradient_counts_as_failed():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1, bias=False))
    x = torch.rand(30, 2)
    optimizer = so.LevenbergMarquardt(net.parameters(), race=False)
    optimizer.step(lambda: mse_loss(net(x), x[:, :1]))
    assert optimizer.metrics()["ratio"] > 0
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
    optimizer.step(lambda: mse_loss(net(x), x[:, :1]))
    assert optimizer.metrics()["ratio"] == 0


def test_an_error_in_a_trial_takes_the_step_back():
    net, x, y = regression()
    optimizer = so.LevenbergMarquardt(net.parameters())
    optimizer.step(lambda: mse_loss(net(x), y))
    before, calls = flat(net), []

    def closure():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return mse_loss(net(x), y)

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    torch.testing.assert_close(flat(net), before, rtol=0, atol=0)
    assert torch.autograd.backward.__module__ == "torch.autograd"


def test_float32():
    net, x, y = regression()
    net, x, y = net.float(), x.float(), y.float()
    optimizer = so.LevenbergMarquardt(net.parameters(), rows=20)
    first = float(optimizer.step(lambda: mse_loss(net(x), y)))
    for _ in range(30):
        last = float(optimizer.step(lambda: mse_loss(net(x), y)))
    assert last < 1e-2 * first


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lr": -0.1}, ValueError), ({"lr": 2.0}, ValueError), ({"lr": "a"}, TypeError), ({"rows": 0}, ValueError),
        ({"rows": 2.5}, ValueError), ({"max_rows": -1}, ValueError), ({"damping": 0.0}, ValueError),
        ({"solver": "cg"}, ValueError), ({"memory": -1}, ValueError), ({"nonfinite": "no"}, ValueError),
        ({"seed": None}, ValueError), ({"holdout": 0.1}, ValueError),
        ({"memory": True}, ValueError), ({"seed": True}, ValueError), ({"holdout": 1}, ValueError),
        ({"race": None}, ValueError), ({"acceleration": "no"}, ValueError),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(options, error):
    with pytest.raises(error, match=f"LevenbergMarquardt: expected {next(iter(options))}"):
        so.LevenbergMarquardt(nn.Linear(2, 1).parameters(), **options)


def test_parameters_of_several_dtypes_are_refused():
    with pytest.raises(TypeError, match="of one dtype, float32 or float64"):
        so.LevenbergMarquardt([*nn.Linear(2, 1).parameters(), *nn.Linear(2, 1).float().parameters()])
    with pytest.raises(TypeError, match="of one dtype, float32 or float64"):
        so.LevenbergMarquardt(nn.Linear(2, 1).bfloat16().parameters())


def test_the_warm_up_ends_at_a_tenth_of_the_loss_or_goes_on_until_it_has_halved(monkeypatch):
    steps = []
    own = so.EigenAdam.step
    monkeypatch.setattr(so.EigenAdam, "step", lambda self, closure=None: steps.append(1) or own(self, closure))
    fast, x, y = regression()
    so.LevenbergMarquardt(fast.parameters()).step(lambda: mse_loss(fast(x), y))
    assert 5 < len(steps) < race.WARM_UP
    steps.clear()
    noisy = regression()[0]
    y = y + 0.5 * y.std() * torch.randn(y.shape)  # a fifth of the mean square is noise
    so.LevenbergMarquardt(noisy.parameters()).step(lambda: mse_loss(noisy(x), y))
    assert len(steps) == race.WARM_UP
    steps.clear()
    slow = nn.Linear(20, 1)
    so.LevenbergMarquardt(slow.parameters()).step(lambda: ((slow(torch.ones(5, 20)) - 1e6) ** 2).mean())
    assert len(steps) == race.LONGEST


@pytest.mark.parametrize("write", [lambda p: p.clamp_(-10, 10), lambda p: p.clamp_(0, 1), lambda p: p.data.clamp_(0, 1)])
def test_a_closure_that_writes_to_a_parameter_is_refused(write):
    """As one that keeps an image's pixels in their range; where it changes no number, too, since graphs would not hold."""
    x = torch.linspace(0, 5, 60)
    p = nn.Parameter(torch.tensor([1.0, 1.0]))

    def closure():
        with torch.no_grad():
            write(p)
        return (p[0] * (-p[1] * x).exp() - 2.5 * (-1.3 * x).exp()).square().sum()

    optimizer = so.LevenbergMarquardt([p])
    with pytest.raises(RuntimeError, match=r"writes to the one of shape \(2,\). Clamp or project it after the step"):
        for _ in range(3):
            optimizer.step(closure)
    assert torch.equal(p, torch.ones(2))


class Labelled(torch.Tensor):
    """A tensor whose methods read labels that results of other operations lack, as PDE frameworks have them."""

    labels: list

    def _labelled(self, name, *args, **kwargs):
        result = getattr(self.as_subclass(torch.Tensor), name)(*args, **kwargs).as_subclass(Labelled)
        result.labels = self.labels
        return result


for method in ("to", "detach", "reshape", "clone", "flatten", "view", "__getitem__", "transpose", "square", "expand"):
    setattr(Labelled, method, lambda self, *args, name=method, **kwargs: self._labelled(name, *args, **kwargs))


@pytest.mark.parametrize("returned", ["loss", "detached", "pair"])
def test_tensors_with_labels(returned):
    losses = {}
    for labelled in (False, True):
        torch.manual_seed(0)
        net, x, y = regression()
        scale = nn.Parameter(torch.ones(6))
        optimizer = so.LevenbergMarquardt([*net.parameters(), scale])
        if labelled:
            x = x.as_subclass(Labelled)
            x.labels = ["x", "y"]

        def closure(net=net, x=x, y=y, scale=scale):
            u = net[2](scale * torch.tanh(torch.nn.functional.linear(x, net[0].weight, net[0].bias)))
            assert isinstance(u, Labelled) == isinstance(x, Labelled) and not hasattr(u, "labels")
            if returned == "pair":
                return [(u - y, 2.0)]
            loss = 2 * ((u - y) ** 2).mean()
            loss.backward()
            return loss if returned == "loss" else loss.as_subclass(torch.Tensor).detach()

        losses[labelled] = [float(optimizer.step(closure)) for _ in range(4)]
    assert losses[True] == losses[False]
    assert losses[True][-1] < 1e-2 * losses[True][0]


def test_penalties_of_parameters_of_a_subclass():
    class Named(nn.Parameter):
        pass

    ends = []
    for kind in (nn.Parameter, Named):
        torch.manual_seed(0)
        w, x, y = kind(torch.randn(3, 1)), torch.randn(20, 3), torch.randn(20, 1)
        optimizer = so.LevenbergMarquardt([w], race=False)
        for _ in range(2):
            optimizer.step(lambda w=w, x=x, y=y: mse_loss(torch.tanh(x @ w), y) + 0.1 * (w**2).sum())
        ends.append(w.detach().as_subclass(torch.Tensor))
    assert torch.equal(*ends)
