"""KBFGS and KBFGSL on all sorts of models, with checkpoints, groups and schedulers, and on bad input."""

import copy
import math

import pytest
import torch
from helpers.kbfgs import autoencoder, closure_of
from torch import nn

import secondorder as so
from secondorder.optim._kbfgs.layer import damped_inverse
from secondorder.optim._kbfgs.trials import Trials


def test_a_failure_after_the_trial_changes_nothing(monkeypatch):
    model, x = autoencoder(), torch.randn(16, 7, dtype=torch.float64)
    optimizer = so.KBFGS(model, nn.MSELoss(), doubled_batch=True)

    def fail(*_):
        raise RuntimeError("another rank has failed")

    monkeypatch.setattr(Trials, "_finite_gradients", fail)
    closure = closure_of(optimizer, model, nn.MSELoss(), x, x)
    unchanged(model, optimizer, lambda: optimizer.step(closure), RuntimeError, "another rank has failed")


@pytest.mark.filterwarnings("ignore:secondorder. no curvature covers")
@pytest.mark.parametrize(("cls", "operator"), [
    (so.KBFGS, "hessian_action_update_"), (so.KBFGS, "damped_bfgs_update_"), (so.KBFGSL, "damped_lbfgs_update_"),
])  # fmt: skip
def test_a_failure_while_the_factors_are_updated_changes_nothing(cls, operator, monkeypatch):
    """As where the memory is exhausted, or the user interrupts: the parameters have moved, and some factors have changed."""
    torch.manual_seed(0)
    model, x = Custom().double(), torch.randn(20, 5, dtype=torch.float64)
    optimizer = cls(model, nn.MSELoss())
    optimizer.param_groups[0]["momentum"] = 0.9  # of the fallback
    closure, update = closure_of(optimizer, model, nn.MSELoss(), x, x[:, :3]), getattr(so.ops, operator)

    def fail(*args):
        update(*args)
        raise KeyboardInterrupt

    for _ in range(3):  # the first time there is no state yet
        monkeypatch.setattr(so.ops, operator, fail)
        unchanged(model, optimizer, lambda: optimizer.step(closure), KeyboardInterrupt, None)
        monkeypatch.setattr(so.ops, operator, update)
        optimizer.step(closure)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(5, 8, bias=False), nn.Linear(8, 3)
        self.norm, self.scale = nn.LayerNorm(8), nn.Parameter(torch.ones(()))

    def forward(self, x):
        h = nn.functional.relu(self.a(x), inplace=True) * torch.sigmoid(self.b(input=x))
        return self.scale * self.c(self.norm(h))


@pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL])
def test_custom_module_with_fallback_trains(cls):
    torch.manual_seed(0)
    model = Custom()
    optimizer = cls(model, nn.CrossEntropyLoss(), lr=0.1)
    x = torch.randn(200, 5)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    closure = closure_of(optimizer, model, nn.CrossEntropyLoss(), x, y)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.warns(UserWarning, match=r"'scale', 'norm.weight', 'norm.bias'; they are updated by the fallback"):
        losses = [optimizer.step(closure).item()]
    losses += [optimizer.step(closure).item() for _ in range(30)]
    assert losses[-1] < 0.6 * losses[0]
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert set(optimizer.diagnostics()) == {"a", "b", "c"}


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.GELU, lambda: nn.ReLU(inplace=True), nn.Identity])
def test_sequences_and_extra_dimensions(activation):
    """Inputs [batch, time, n] count as batch * time instances."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), activation(), nn.Linear(6, 2))
    twin = copy.deepcopy(model)
    x, y = torch.randn(10, 3, 4), torch.randn(10, 3, 2)
    for m, inputs, targets in ((model, x, y), (twin, x.reshape(30, 4), y.reshape(30, 2))):
        optimizer = so.KBFGS(m, nn.MSELoss())
        for _ in range(3):
            optimizer.step(closure_of(optimizer, m, nn.MSELoss(), inputs, targets))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_micro_batches_are_their_union():
    """A closure of two forward-backward passes, each of half the loss, is one over both halves."""
    torch.manual_seed(0)
    models = [autoencoder() for _ in range(2)]
    x = torch.randn(20, 7, dtype=torch.float64)
    optimizers = [so.KBFGS(m, nn.MSELoss()) for m in models]

    def halves():
        optimizers[1].zero_grad()
        total = 0
        for part in x.split(10):
            loss = nn.functional.mse_loss(models[1](part), part) / 2
            loss.backward()
            total += loss.detach()
        return total

    for _ in range(5):
        optimizers[0].step(closure_of(optimizers[0], models[0], nn.MSELoss(), x, x))
        optimizers[1].step(halves)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


def test_dropout_repeats_its_mask():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2))
    x, y = torch.randn(30, 6), torch.randn(30, 2)
    masks = []
    model[0].register_forward_hook(lambda module, args, output: masks.append(output == 0))
    optimizer = so.KBFGS(model, nn.MSELoss())
    for _ in range(2):
        optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, y))
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[-2], masks[-1])
    assert not torch.equal(masks[0], masks[-1])


def test_evaluation_inside_the_closure_does_not_count():
    models = [autoencoder() for _ in range(2)]
    x = torch.randn(20, 7, dtype=torch.float64)
    optimizers = [so.KBFGS(m, nn.MSELoss()) for m in models]

    def closure():
        models[1](2 * x)
        with torch.no_grad():
            models[1](3 * x)
        return closure_of(optimizers[1], models[1], nn.MSELoss(), x, x)()

    for _ in range(3):
        optimizers[0].step(closure_of(optimizers[0], models[0], nn.MSELoss(), x, x))
        optimizers[1].step(closure)
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_autocast():
    """Under autocast the layers compute in bfloat16; the factors keep the parameters' dtype."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9, bias=False), nn.ReLU(), nn.Linear(9, 6))
    optimizer = so.KBFGS(model, nn.MSELoss(), lr=0.1)
    x = torch.randn(50, 6)

    def closure():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        loss = nn.functional.mse_loss(output.float(), x)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.state[model[2].weight]["input_second_moment"].dtype == torch.float32


@pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL])
def test_state_dict_round_trip_is_exact(cls, tmp_path):
    torch.manual_seed(0)
    model = autoencoder(dtype=torch.float32)
    optimizer = cls(model, nn.MSELoss())
    x = torch.randn(20, 7)

    def train(optimizer, model, steps):
        return [optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x)).item() for _ in range(steps)]

    train(optimizer, model, 4)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    other = autoencoder(dtype=torch.float32)
    resumed = cls(other, nn.MSELoss(), lr=1.0)
    checkpoint = torch.load(tmp_path / "checkpoint")
    other.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["optimizer"])
    assert resumed.diagnostics() == optimizer.diagnostics()
    assert train(resumed, other, 4) == train(optimizer, model, 4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_parameter_groups_and_schedulers_are_read_at_every_step():
    model = autoencoder()
    optimizer = so.KBFGS(model, nn.MSELoss(), lr=0.1)
    optimizer.param_groups[0]["params"] = list(model[0].parameters())
    optimizer.add_param_group({"params": [p for m in model[1:] for p in m.parameters()], "lr": 0.0})
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.0)
    before = [p.clone() for p in model.parameters()]
    x = torch.randn(20, 7, dtype=torch.float64)
    optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x))
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [True, True] + [False] * 6
    scheduler.step()
    before = model[0].weight.clone()
    optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x))
    assert torch.equal(model[0].weight, before)


def unchanged(model, optimizer, action, error, match):
    parameters, state = [p.clone() for p in model.parameters()], copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=match):
        action()
    assert all(torch.equal(p, q) and p.requires_grad for p, q in zip(model.parameters(), parameters, strict=True))
    for key, value in optimizer.state_dict()["state"].items():
        for name, v in value.items():
            other = state["state"][key][name]
            assert torch.equal(v, other) if isinstance(v, torch.Tensor) else v == other


@pytest.mark.parametrize("steps", [0, 2])
def test_bad_closures_change_nothing(steps):
    torch.manual_seed(0)
    model = autoencoder()
    optimizer = so.KBFGS(model, nn.MSELoss())
    x = torch.randn(20, 7, dtype=torch.float64)
    for _ in range(steps):
        optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x))

    def other_data():
        return closure_of(optimizer, model, nn.MSELoss(), torch.randn(20, 7).double(), x)()

    def other_size():
        n = next(sizes)
        return closure_of(optimizer, model, nn.MSELoss(), x[:n], x[:n])()

    sizes = iter([20, 10])

    calls = []

    def fails_at_second_call():
        calls.append(1)
        if len(calls) == 1:
            return closure_of(optimizer, model, nn.MSELoss(), x, x)()
        raise KeyError("second call")

    bad = x.clone()
    bad[3, 3] = math.nan
    batches = iter([torch.randn(20, 7).double(), torch.randn(20, 7).double()])

    def next_batch():
        batch = next(batches)
        return closure_of(optimizer, model, nn.MSELoss(), batch, batch)()

    unchanged(model, optimizer, lambda: optimizer.step(), RuntimeError, "expected a closure")
    unchanged(model, optimizer, lambda: optimizer.step(next_batch), RuntimeError, "same mini-batch at every call")
    unchanged(
        model, optimizer, lambda: optimizer.step(other_size), RuntimeError,
        "same mini-batch at every call, but it calls layer '0' on 20 rows, and then on 10",
    )  # fmt: skip
    unchanged(model, optimizer, lambda: optimizer.step(fails_at_second_call), KeyError, "second call")
    unchanged(
        model, optimizer, lambda: optimizer.step(closure_of(optimizer, model, nn.MSELoss(), bad, x)), RuntimeError,
        "gradient of layer '0', '2', '3', '5' holds NaN or inf",
    )  # fmt: skip
    unchanged(
        model,
        optimizer,
        lambda: optimizer.step(lambda: model(x).sum().backward()),
        RuntimeError,
        "return the scalar loss",
    )
    optimizer.zero_grad()
    unchanged(model, optimizer, lambda: optimizer.step(lambda: model(x).sum()), RuntimeError, "expected gradients, found none")
    # A closure that draws from torch's generator draws the same batch twice: that is no error.
    optimizer.step(other_data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr >= 0"), ({"damping": 0}, r"damping in \(0, 1\]"), ({"damping": 1.5}, "damping"),
        ({"mu1": 1.0}, "mu1"), ({"decay": 1.0}, "decay"), ({"weight_decay": -1}, "weight_decay"),
        ({"max_increase": -0.1}, "max_increase"), ({"fallback": "no"}, "fallback"), ({"memory": 0}, "memory to be an int >= 1"),
        ({"damping_a": 0.0}, r"damping_a > 0, or None"), ({"damping_g": 1.5}, r"damping_g in \(0, 1\]"),
        ({"pairs": "all"}, "pairs to be one of 'damped', 'damped-bounded', 'bounded', got 'all'"),
        ({"input_inverse": "inverse"}, "'hessian-action' or 'exact'"),
    ],
)  # fmt: skip
def test_constructor_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        so.KBFGSL(autoencoder(), nn.MSELoss(), **options)


def test_a_solver_whose_steps_adapt_is_refused_with_what_to_do():
    torch.manual_seed(0)
    model = autoencoder()
    optimizer, x, steps = so.KBFGS(model, nn.MSELoss()), torch.randn(20, 7).double(), iter([2, 3])

    def closure():
        optimizer.zero_grad()
        z, n = x, next(steps)
        for _ in range(n):
            z = z + model(z) / n
        loss = z.square().mean()
        loss.backward()
        return loss

    message = "calls layer '0' on 40 rows, and then on 60.*give it steps of fixed length"
    unchanged(model, optimizer, lambda: optimizer.step(closure), RuntimeError, message)


class Mixed(nn.Module):
    """Layers of two dtypes."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 6), nn.Linear(6, 5).double(), nn.Linear(5, 3)

    def forward(self, x):
        h = self.first(x.to(self.first.weight.dtype)).tanh()
        h = self.middle(h.to(self.middle.weight.dtype)).tanh()
        return self.last(h.to(self.last.weight.dtype))


@pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL])
def test_layers_may_have_several_dtypes(cls):
    torch.manual_seed(0)
    model, x, y = Mixed(), torch.randn(20, 4), torch.randn(20, 3)
    double = copy.deepcopy(model).double()
    for each, target in ((model, y), (double, y.double())):
        optimizer = cls(each, nn.MSELoss())
        for _ in range(5):
            optimizer.step(closure_of(optimizer, each, nn.MSELoss(), x, target))
    for p, q in zip(model.parameters(), double.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-3, atol=1e-4)


class Routed(nn.Module):
    """Two experts, of which a row takes one by the sign of what the layer before returns."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x):
        h = self.first(x).tanh()
        chosen = [(h[:, 0] < 0).nonzero().flatten(), (h[:, 0] >= 0).nonzero().flatten()]
        self.rows = [len(each) for each in chosen]
        parts = [expert(h[each]) for expert, each in zip(self.experts, chosen, strict=True)]
        return self.last(torch.zeros_like(h).index_add(0, torch.cat(chosen), torch.cat(parts)).tanh())


@pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL])
def test_means_of_other_rows_are_no_pair(cls):
    torch.manual_seed(0)
    model, criterion = Routed().double(), nn.MSELoss()
    with torch.no_grad():
        model.first.weight[0], model.first.bias[0] = 1e-3, 0  # a small step sends rows to the other expert
    optimizer, x, y = cls(model, criterion), torch.randn(50, 4).double(), torch.randn(50, 2).double()
    closure = closure_of(optimizer, model, criterion, x, y)
    model(x)
    before = model.rows
    with pytest.warns(UserWarning, match=r"layers 'experts.0' and 'experts.1' on other numbers of rows after the step"):
        optimizer.step(closure)
    assert model.rows != before
    counts = {name: each["skipped"] for name, each in optimizer.diagnostics().items()}
    assert counts == {"first": 0, "experts.0": 1, "experts.1": 1, "last": 0}
    for expert in model.experts:
        state = optimizer.state[expert.weight]
        assert not state["s"].any()
        assert not state["y"].any()
        assert state["scale_pairs"] == 0
    optimizer.step(closure)  # it is said once, and the same rows are a pair
    model(x)
    skipped = optimizer.diagnostics()["experts.0"]["skipped"]
    rows = model.rows
    for group in optimizer.param_groups:
        group["lr"] = 1e-12
    optimizer.step(closure)
    assert (model.rows, optimizer.diagnostics()["experts.0"]["skipped"]) == (rows, skipped)


def test_inputs_whose_squares_overflow_change_nothing():
    """Their units are saturated, and so the loss and its gradients are finite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer, x, y = so.KBFGS(model, nn.MSELoss()), torch.randn(10, 3), torch.randn(10, 2)
    closure = closure_of(optimizer, model, nn.MSELoss(), 1e25 * x, y)
    for _ in range(2):
        unchanged(model, optimizer, lambda: optimizer.step(closure), so.NonFiniteError, "inputs of layer '0' .* squares that")
        optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, y))


@pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL])
def test_biases_may_be_frozen_unfrozen_and_left_out_of_the_groups(cls):
    """A step is that of a net that has never had them, or has begun with them."""
    torch.manual_seed(0)
    x, criterion = torch.randn(20, 7).double(), nn.MSELoss()
    with_biases, without = autoencoder(), autoencoder(bias=False)
    without.load_state_dict({name: p for name, p in with_biases.state_dict().items() if name.endswith("weight")})
    for p in with_biases.parameters():
        if p.dim() == 1:
            p.data.zero_()
    fresh = copy.deepcopy(with_biases)
    optimizer, plain = cls(with_biases, criterion, max_step=None), cls(without, criterion, max_step=None)
    biases = [p for p in with_biases.parameters() if p.dim() == 1]
    optimizer.param_groups[0]["params"] = [p for p in with_biases.parameters() if p.dim() == 2]
    for _ in range(3):
        for each, model in ((optimizer, with_biases), (plain, without)):
            each.step(closure_of(each, model, criterion, x, x))
    for name, p in without.named_parameters():
        torch.testing.assert_close(p, with_biases.get_parameter(name))
    with_biases.load_state_dict(fresh.state_dict())
    optimizer.add_param_group({"params": biases})
    other = cls(fresh, criterion, max_step=None)
    for each, model in ((optimizer, with_biases), (other, fresh)):
        each.step(closure_of(each, model, criterion, x, x))
    for name, p in fresh.named_parameters():
        torch.testing.assert_close(p, with_biases.get_parameter(name))
    for p in biases:
        p.requires_grad_(False)
    moved = [p.clone() for p in with_biases.parameters()]
    optimizer.step(closure_of(optimizer, with_biases, criterion, x, x))
    assert all(torch.equal(p, q) != (p.dim() == 2) for p, q in zip(with_biases.parameters(), moved, strict=True))
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL])
def test_a_checkpoint_that_is_saved_right_after_biases_are_frozen_or_unfrozen_goes_on(cls, frozen):
    torch.manual_seed(0)
    x, criterion = torch.randn(20, 7).double(), nn.MSELoss()
    model, copied = autoencoder(), autoencoder()
    optimizer, other = cls(model, criterion), cls(copied, criterion)
    biases = [p for p in [*model.parameters(), *copied.parameters()] if p.dim() == 1]
    for trained in (frozen, not frozen):
        for p in biases:
            p.requires_grad_(trained)
        if trained == frozen:
            for _ in range(3):
                optimizer.step(closure_of(optimizer, model, criterion, x, x))
    copied.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        for each, net in ((optimizer, model), (other, copied)):
            each.step(closure_of(each, net, criterion, x, x))
    for p, q in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(p, q)


def test_initialize_counts_where_biases_are_left_out_of_the_groups():
    torch.manual_seed(0)
    model, x = autoencoder(), torch.randn(20, 7).double()
    optimizer = so.KBFGS(model, nn.MSELoss())
    optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p.dim() == 2]
    optimizer.initialize([3 * x, 5 * x])
    optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x))
    torch.testing.assert_close(optimizer.state[model[0].weight]["input_second_moment"], 17 * x.T @ x / 20)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_the_inverse_from_a_few_rows_is_that_of_their_second_moment(scale):
    rows = scale * torch.randn(9, 40)
    exact = torch.linalg.inv(rows.double().T @ rows.double() / 9 + 0.5 * torch.eye(40).double())
    found = damped_inverse(torch.full((40, 40), math.nan), 0.5, rows)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL])
def test_layers_with_more_inputs_than_the_limit_get_the_fallback(cls):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(30, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(10, 30)
    optimizer = cls(model, nn.MSELoss(), max_input_dim=29)
    with pytest.warns(UserWarning, match="layer '0' has 30 inputs, more than max_input_dim = 29"):
        optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x[:, :2]))
    assert list(optimizer.diagnostics()) == ["2"]


def test_zero_input_layer_is_skipped_and_counted():
    """Without a bias, a mean input of zero gives Hessian action nothing to act on."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2))
    optimizer = so.KBFGS(model, nn.MSELoss())
    x = torch.zeros(10, 3)
    optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, torch.ones(10, 2)))
    counts = optimizer.diagnostics()
    assert counts["0"]["input_skipped"] == 1
    assert counts["0"]["damped_s"] == 1  # s = 0 there: no step can move the preactivations
    assert counts["2"]["input_skipped"] == counts["2"]["skipped"] == 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_closure_that_adds_to_gradients_from_before_it_is_refused(set_to_none):
    model, criterion = autoencoder(), nn.MSELoss()
    x = torch.randn(8, 7).double()
    optimizer = so.KBFGS(model, criterion)

    def accumulates():
        loss = criterion(model(x), x)
        loss.backward()
        return loss

    def zeroes():
        optimizer.zero_grad(set_to_none)
        return accumulates()

    accumulates()
    before, gradient = copy.deepcopy((model.state_dict(), optimizer.state_dict())), model[0].weight.grad.clone()
    with pytest.raises(RuntimeError, match=r"expected a closure that calls optimizer.zero_grad\(\) first"):
        optimizer.step(accumulates)
    assert all(torch.equal(value, before[0][key]) for key, value in model.state_dict().items())
    assert optimizer.state_dict()["state"] == before[1]["state"] == {}
    optimizer.step(zeroes)
    torch.testing.assert_close(model[0].weight.grad, gradient)
    model.zero_grad()
    optimizer.step(accumulates)


@pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL])
def test_a_state_in_other_units_is_refused(cls):
    model, criterion = nn.Linear(3, 2), nn.MSELoss()
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    states = {}
    for scale in ("curvature", None):
        optimizer = cls(model, criterion, scale=scale)

        def closure(optimizer=optimizer):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        states[scale] = optimizer.state_dict()
    for scale, other in (("curvature", None), (None, "curvature")):
        with pytest.raises(ValueError, match=f"make this one with scale={other!r}"):
            cls(model, criterion, scale=scale).load_state_dict(states[other])
