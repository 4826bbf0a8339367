"""Bad arguments, models, loops, numbers and solvers: a clear error, and nothing has changed."""

import copy
import inspect

import numpy as np
import pytest
import torch
from helpers.training import CRITERIA, WIDTHS, assert_same, batch, network, one_step, poison_gradient, poison_input, snapshot
from torch import nn
from torch.nn import functional as F

import secondorder as so
from secondorder.curvature import PCH
from secondorder.solvers import SOLVERS, EACGSolver


@pytest.mark.parametrize("key", ["lr", "momentum", "weight_decay", "factor_decay", "alpha"])
@pytest.mark.parametrize("value", [float("nan"), -1.0, float("inf"), "fast"])
def test_groups_are_checked_at_every_step(key, value):
    criterion, model, (x, y) = nn.CrossEntropyLoss(), network(), batch()
    optimizer = so.EACG(model, criterion)
    one_step(model, criterion, optimizer, x, y)
    before = copy.deepcopy(model.state_dict())
    optimizer.param_groups[0][key] = value
    with pytest.raises((ValueError, TypeError), match=f"expected {key} "):
        one_step(model, criterion, optimizer, x, y)
    assert_same(model.state_dict(), before)


def test_an_overflowing_update_is_refused():
    model, criterion, (x, y) = network().float(), nn.CrossEntropyLoss(), batch()
    optimizer = so.EACG(model, criterion, lr=0.02)
    optimizer.zero_grad()
    criterion(model(x.float() * 0), y).backward()
    model[0].weight.grad.fill_(1e37)  # finite, and invisible along a mean input of 0; over alpha it is not
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="layer '0': the solution overflows"):
        optimizer.step()
    assert_same(model.state_dict(), before)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(10, 5, sparse=True)
    model = nn.Sequential(embedding, nn.Linear(5, 3))
    criterion = nn.CrossEntropyLoss()
    optimizer = so.LayerwiseNewton(model, criterion)
    with pytest.raises(RuntimeError, match=r"sparse one for '0.weight'"):
        one_step(model, criterion, optimizer, torch.arange(6), torch.randint(3, (6,)))


@pytest.mark.parametrize("solver", ["ea-cg", "ea-cg-truncated"])
def test_a_broken_factor_is_seen_without_a_gradient(solver):
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), nn.MSELoss()
    nn.init.constant_(model[0].bias, -100.0)  # dead units: the gradient of the first layer is 0
    nn.init.constant_(model[2].weight, 1e20)  # and its H, which goes through these, overflows
    optimizer = so.EACG(model, criterion, lr=0.01, alpha=0.1, solver=solver)
    with pytest.raises(so.NonFiniteError, match="layer '0': NaN or inf in its bias Hessian"):
        one_step(model, criterion, optimizer, torch.randn(5, 4), torch.randn(5, 2))
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("make", [so.EACG, so.LayerwiseNewton])
def test_inputs_whose_squares_overflow_leave_nothing_behind(make, solver):
    """Behind saturated units, where loss and gradients are finite; in an average they would spoil every later step."""
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)), nn.MSELoss()
    optimizer, (x, y) = make(model, criterion, solver=solver), (torch.randn(10, 3), torch.randn(10, 2))
    for _ in range(2):
        before = snapshot(model, optimizer)
        with pytest.raises(so.NonFiniteError, match="layer '0': NaN or inf in its "):
            one_step(model, criterion, optimizer, 1e25 * x, y)
        assert_same(snapshot(model, optimizer), before)
        one_step(model, criterion, optimizer, x, y)


def poison_weight(model, x):
    with torch.no_grad():
        model[2].weight[1, 1] = float("inf")


@pytest.mark.parametrize("poison", [poison_input, poison_weight, poison_gradient])
@pytest.mark.parametrize("solver", ["ea-cg", "ea-cg-truncated"])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("criterion", CRITERIA, ids=["cross-entropy", "eq14"])
def test_numbers_that_are_not_finite_change_nothing(poison, solver, warm, criterion):
    model, (x, y) = network(), batch()
    optimizer = so.LayerwiseNewton(model, criterion, solver=solver)
    if warm:
        one_step(model, criterion, optimizer, x, y)
    good = copy.deepcopy(model.state_dict())
    poison(model, x)
    before = snapshot(model, optimizer)
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)nan or inf|not finite"):
        one_step(model, criterion, optimizer, x, y)
    if poison is not poison_weight:
        assert_same(snapshot(model, optimizer), before)
        model[0].weight._backward_hooks and model[0].weight._backward_hooks.clear()
    model.load_state_dict(good)
    one_step(model, criterion, optimizer, *batch())  # and it goes on
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_failed_step_names_the_layer():
    criterion, model, (x, y) = nn.CrossEntropyLoss(), network(), batch()
    optimizer = so.LayerwiseNewton(model, criterion)
    poison_gradient(model, x)
    with pytest.raises(RuntimeError, match="layer '0': NaN or inf in its weight gradient. No parameter and no state has changed"):
        one_step(model, criterion, optimizer, x, y)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": -0.1}, "expected lr >= 0, got -0.1"),
        ({"lr": float("nan")}, "expected lr >= 0, got nan"),
        ({"alpha": 0.0}, r"expected alpha in \(0, 1\), got 0.0"),
        ({"alpha": 1.0}, r"expected alpha in \(0, 1\), got 1.0"),
        ({"curvature": PCH}, "expected curvature to be one of"),
        ({"curvature": "hessian"}, "expected curvature to be one of .*'pch-abs', 'pch-clip', .*, got 'hessian'"),
        ({"solver": "cg"}, "expected solver to be one of .*'ea-cg', 'ea-cg-truncated', .*, got 'cg'"),
        ({"max_cg": 0}, "expected max_cg to be an int >= 1, got 0"),
        ({"eps_cg": -1.0}, "expected eps_cg >= 0"),
        ({"momentum": 1.0}, r"expected momentum in \[0, 1\), got 1.0"),
        ({"weight_decay": -1.0}, "expected weight_decay >= 0"),
        ({"factor_decay": 1.0}, r"expected factor_decay in \[0, 1\)"),
        ({"curvature_every": 0}, "expected curvature_every to be an int >= 1"),
        ({"max_step": 0.0}, "expected max_step > 0, or None for no bound, got 0.0"),
        ({"max_step": float("nan")}, "expected max_step > 0, or None for no bound, got nan"),
        ({"fallback": "adam"}, "expected fallback 'sgd' or 'error', got 'adam'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        so.EACG(network(), nn.CrossEntropyLoss(), **kwargs)
    with pytest.raises(ValueError, match="expected gamma <= 0"):
        PCH(0.1)


def test_bad_models_and_criteria():
    criterion = nn.CrossEntropyLoss()
    with pytest.raises(TypeError, match="expected model to be an nn.Module, got generator; pass the model itself"):
        so.LayerwiseNewton(network().parameters(), criterion)
    with pytest.raises(TypeError, match="expected criterion to be an nn.Module or a function .*, got str"):
        so.LayerwiseNewton(network(), "mse")
    with pytest.raises(ValueError, match="at least one trainable nn.Linear, got Conv1d with none"):
        so.LayerwiseNewton(nn.Conv1d(1, 1, 3), criterion)
    with pytest.raises(ValueError, match="at least one trainable nn.Linear"):
        so.LayerwiseNewton(network().requires_grad_(False), criterion)
    with pytest.raises(TypeError, match="float32, float64 or bfloat16, got torch.float16 in layer '0'"):
        so.LayerwiseNewton(network().half(), criterion)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    with pytest.raises(ValueError, match="the weight of layer '0' is shared by '0' and '2', which are not all nn.Linear"):
        so.LayerwiseNewton(tied, criterion)


def test_bad_loops():
    criterion, model, (x, y) = nn.CrossEntropyLoss(), network(), batch()
    optimizer = so.LayerwiseNewton(model, criterion)
    with pytest.raises(RuntimeError, match=r"expected gradients, found none; call loss.backward\(\) first"):
        optimizer.step()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="no call of the criterion .*CrossEntropyLoss"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"expected the criterion .* to return a scalar, got shape \(8,\)"):
        vector = nn.CrossEntropyLoss(reduction="none")
        one_step(model, vector, so.LayerwiseNewton(model, vector), x, y)


EVERY_OPTIMIZER = [
    lambda m, c: so.LayerwiseNewton(m, c),
    lambda m, c: so.EACG(m, c, 0.1),
    lambda m, c: so.EACG(m, c, 0.1, curvature="fisher-empirical"),
    lambda m, c: so.EACG(m, c, 0.1, curvature="kflr", solver="kfi"),
    lambda m, c: so.KFAC(m, c),
    lambda m, c: so.KFRA(m, c),
    lambda m, c: so.KFLR(m, c),
    lambda m, c: so.KBFGS(m, c, lr=0.1),
]


def stepper(model, make, x, y):
    criterion = nn.CrossEntropyLoss(reduction="sum")
    optimizer = make(model, criterion)

    def closure():
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    def step():
        if isinstance(optimizer, so.KBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()

    return step


@pytest.mark.parametrize("make", EVERY_OPTIMIZER)
def test_an_empty_batch_is_refused_and_one_of_several_is_not(make):
    model, (x, y) = network(), batch()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"step\(\): expected at least one instance, got an empty batch"):
        stepper(model, make, x[:0], y[:0])()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("make", EVERY_OPTIMIZER)
def test_a_layer_of_no_outputs(make):
    x, y = batch()
    model = nn.Sequential(nn.Linear(WIDTHS[0], 0), nn.Tanh(), nn.Linear(0, WIDTHS[-1])).double()
    before = model[2].bias.detach().clone()
    stepper(model, make, x, y)()
    assert not torch.equal(model[2].bias, before)


@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum")])
def test_an_empty_batch_may_be_evaluated(criterion):
    model, (x, y) = network(), batch()
    for curvature in ("pch-abs", "kflr"):
        so.EACG(model, criterion, 0.1, curvature=curvature)
        output = model(x[:0])
        criterion(output, y[:0] if isinstance(criterion, nn.CrossEntropyLoss) else torch.zeros_like(output)).backward()


@pytest.mark.parametrize("curvature", ["pch-abs", "fisher-empirical", "kflr"])
def test_a_batch_whose_rows_are_all_ignored_moves_nothing(curvature):
    """Its loss is NaN and its gradient 0: momentum alone would move the parameters."""
    model, criterion, (x, y) = network(), nn.CrossEntropyLoss(), batch()
    optimizer = so.EACG(model, criterion, lr=0.1, curvature=curvature)
    one_step(model, criterion, optimizer, x, y)
    before = snapshot(model, optimizer)
    with pytest.raises(so.NonFiniteError, match="the loss itself is not finite.*No parameter and no state has changed"):
        one_step(model, criterion, optimizer, x, torch.full_like(y, -100))
    assert_same(snapshot(model, optimizer), before)
    one_step(model, criterion, optimizer, x, y)


def test_a_mistake_in_a_solver_is_no_skipped_step():
    class Wrong(EACGSolver):
        def solve(self, prepared, grad_weight, grad_bias):
            return grad_weight @ grad_weight, None

    model, criterion, (x, y) = network(), nn.CrossEntropyLoss(), batch()
    optimizer = so.EACG(model, criterion, solver=Wrong(5, 0.0), nonfinite="skip")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        one_step(model, criterion, optimizer, x, y)
    assert not isinstance(raised.value, so.NonFiniteError)
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda p, d: {}["missing"], "KeyError: 'missing'"),
        (lambda p, d: (p.T, d), r"expected a direction of shape \[4, 7\], got shape \[7, 4\]"),
        (lambda p, d: (p, p[0]), r"expected a direction of shape \[4\], got shape \[7\]"),
        (lambda p, d: (p,), "ValueError: not enough values to unpack"),
    ],
)
@pytest.mark.parametrize("method", [so.EACG, so.LayerwiseNewton])
def test_an_error_of_a_solver_names_the_layer_and_leaves_everything(method, wrong, message):
    class Wrong(EACGSolver):
        fails = False

        def solve(self, prepared, grad_weight, grad_bias):
            p, d = super().solve(prepared, grad_weight, grad_bias)
            return wrong(p, d) if Wrong.fails and p.shape == (4, 7) else (p, d)

    model, criterion, (x, y) = network(), nn.CrossEntropyLoss(), batch()
    optimizer = method(model, criterion, solver=Wrong(5, 0.0))
    one_step(model, criterion, optimizer, x, y)
    before = snapshot(model, optimizer)
    Wrong.fails = True
    with pytest.raises(RuntimeError, match=rf"the solver .*Wrong failed at layer '2': {message}.*No parameter and no state has"):
        one_step(model, criterion, optimizer, x, y)
    assert_same(snapshot(model, optimizer), before)
    Wrong.fails = False
    one_step(model, criterion, optimizer, x, y)


COUNTS = {
    "curvature_every", "curvature_samples", "inverse_every", "max_cg", "max_factor_elements", "max_factor_dim", "max_input_dim",
    "memory", "rank", "renew_every", "rows", "max_rows", "max_iter", "corrections",
}  # fmt: skip


@pytest.mark.parametrize("value", [2.5, True, -1])
@pytest.mark.parametrize("name", so.optim.__all__)
def test_counts_are_integers(name, value):
    make = getattr(so, name)
    counts = COUNTS & inspect.signature(make).parameters.keys()
    assert counts
    for count in counts:
        arguments = [network()] if name in ("EigenAdam", "LevenbergMarquardt") else [network(), nn.CrossEntropyLoss()]
        with pytest.raises(ValueError, match=f"{name}: expected {count} to be an int >= [01]"):
            make(*arguments, **{count: value})


def test_counts_may_be_numpys():
    so.EACG(network(), nn.CrossEntropyLoss(), max_cg=np.int64(10), curvature_every=np.int32(2))
