"""What people do with any torch optimizer, done with every optimizer of the package."""

import copy
import inspect
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from helpers import kinds
from helpers.optimizers import ALL, FIXED, OTHERS, parameters
from helpers.training import assert_same
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils._pytree import tree_leaves

import secondorder as so

one_call = pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("KBFGS")])
fixed = pytest.mark.parametrize("name", FIXED)
every = pytest.mark.parametrize("name", ALL)


def network(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def batch(seed=0, m=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, 5, generator=generator).to(dtype), torch.randint(3, (m,), generator=generator)


def step(model, optimizer, x, y, between=lambda: None):
    """One step; `between` comes after the backward pass that gives the gradients."""

    def closure():
        optimizer.zero_grad()
        loss = optimizer.criterion(model(x), y)
        loss.backward()
        if model[0].weight.grad is not None:  # not so in the second call of K-BFGS
            between()
        return loss

    return float(optimizer.step(closure).detach())


def train(model, optimizer, seeds, **kwargs):
    torch.manual_seed(3)
    return [step(model, optimizer, *batch(seed, **kwargs)) for seed in seeds]


def everything(model, optimizer):
    """All numbers but the count of skipped steps."""
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group.pop("skipped_steps")
    return [parameters(model), state]


def reloaded(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **options)


# --- the loss: maximised, scaled, clipped, penalised ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("KFLR")])
def test_maximizing_is_minimizing_the_negative(name):
    kwargs = {"curvature": "fisher-empirical"} if name.startswith("KFAC") else {}
    models = [network(), network()]
    losses = [lambda z, t: F.cross_entropy(z, t), lambda z, t: -F.cross_entropy(z, t)]
    for model, loss, maximize in zip(models, losses, (False, True), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            train(model, ALL[name](model, loss, maximize=maximize, **kwargs), range(4))
    torch.testing.assert_close(parameters(models[0]), parameters(models[1]))


@every
def test_a_likelihood_is_maximized_too(name):
    """Upwards, though the criterion is convex: where Gauss-Newton refuses that, it says so and nothing has changed."""
    model = network()
    before = parameters(model)
    optimizer = ALL[name](model, nn.CrossEntropyLoss(), maximize=True)
    if name in ("EACG-exact", "KFRA-lr", "KFRA"):
        with pytest.raises(ValueError, match="positive semi-definite"):
            train(model, optimizer, [0])
        assert torch.equal(parameters(model), before)
    else:
        losses = train(model, optimizer, [0] * 5)
        assert losses[-1] > losses[0]


def test_maximize_differs_between_groups():
    model = network()
    optimizer = so.LayerwiseNewton(model, nn.CrossEntropyLoss())
    optimizer.param_groups[0]["params"] = [model[0].weight]
    optimizer.add_param_group({"params": [model[2].weight], "maximize": True})
    with pytest.raises(ValueError, match="maximize to be the same in all param_groups"):
        train(model, optimizer, [0])


@fixed
def test_coupled_weight_decay_is_part_of_the_gradient(name):
    criterion, models = nn.CrossEntropyLoss(), [network(), network()]
    given = FIXED[name](models[0], criterion, weight_decay=0.3, decoupled_weight_decay=False)
    train(models[0], given, range(3))
    by_hand = FIXED[name](models[1], criterion, weight_decay=0.0)

    def penalty():
        for p in models[1].parameters():
            p.grad.add_(p.detach(), alpha=0.3)

    torch.manual_seed(3)
    for seed in range(3):
        step(models[1], by_hand, *batch(seed), penalty)
    torch.testing.assert_close(parameters(models[0]), parameters(models[1]))


@fixed
def test_decoupled_weight_decay_shrinks(name):
    criterion, models = nn.CrossEntropyLoss(), [network(), network()]
    start = parameters(models[0])
    for model, decay in zip(models, (0.0, 0.3), strict=True):
        kwargs = {"max_increase": float("inf")} if name.startswith("KBFGS") else {}
        train(model, FIXED[name](model, criterion, weight_decay=decay, decoupled_weight_decay=True, **kwargs), [0])
    torch.testing.assert_close(parameters(models[1]), parameters(models[0]) - 0.1 * 0.3 * start)


@fixed
def test_a_bias_has_the_numbers_of_its_own_group(name):
    """Biases without weight decay and with another learning rate, as most training scripts have them."""
    criterion, moved = nn.CrossEntropyLoss(), []
    for case in ("weights", "biases", "both"):
        model = network()
        start = parameters(model)
        kwargs = {"max_increase": float("inf")} if name.startswith("KBFGS") else {}
        optimizer = FIXED[name](
            model, criterion, lr=0.02 if case == "biases" else 0.1, weight_decay=0.3, decoupled_weight_decay=True, **kwargs
        )
        if case == "biases":
            optimizer.param_groups[0]["weight_decay"] = 0.0
        if case == "both":
            optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p.dim() == 2]
            biases = [p for p in model.parameters() if p.dim() == 1]
            optimizer.add_param_group({"params": biases, "weight_decay": 0.0, "lr": 0.02})
        train(model, optimizer, [0])
        is_bias = torch.cat([torch.full((p.numel(),), p.dim() == 1) for p in model.parameters()])
        moved.append(parameters(model) - start)
    torch.testing.assert_close(moved[2], torch.where(is_bias, moved[1], moved[0]))


@one_call
@pytest.mark.parametrize("clipped", [False, True])
def test_grad_scaler_changes_nothing(name, clipped):
    criterion, models = nn.CrossEntropyLoss(), [network(), network()]
    optimizers = [ALL[name](model, criterion) for model in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    if clipped:
        optimizers[1].grad_scaler = scaler
    for seed in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            x, y = batch(seed)
            loss = criterion(model(x), y)
            if optimizer is optimizers[0]:
                loss.backward()
            else:
                scaler.scale(loss).backward()
                if clipped:
                    scaler.unscale_(optimizer)
            if clipped:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if optimizer is optimizers[0]:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
    assert_same(everything(models[0], optimizers[0]), everything(models[1], optimizers[1]))


@one_call
def test_grad_scaler_skips_a_step_with_inf(name):
    model = network()
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    train(model, optimizer, range(2))
    before = everything(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.zero_grad()
    x, y = batch()
    scaler.scale(optimizer.criterion(model(x), y)).backward()
    model[2].weight.grad[1, 2] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert_same(everything(model, optimizer), before)
    assert optimizer.skipped_steps == 1
    assert scaler.get_scale() == 4.0
    train(model, optimizer, [3])
    assert not torch.equal(parameters(model), before[0])


def test_what_grad_scaler_cannot_do_is_refused():
    model, scaler, (x, y) = network(), torch.amp.GradScaler("cpu"), batch()
    optimizer = so.LayerwiseNewton(model, nn.CrossEntropyLoss())
    scaler.scale(optimizer.criterion(model(x), y)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"optimizer.grad_scaler = scaler"):
        scaler.step(optimizer)
    optimizer, scaler = so.KBFGS(model, nn.CrossEntropyLoss()), torch.amp.GradScaler("cpu")
    scaler.scale(optimizer.criterion(model(x), y)).backward()
    with pytest.raises(RuntimeError, match="GradScaler knows no closure"):
        scaler.step(optimizer, lambda: None)


@fixed
def test_clipping_scales_the_gradient_alone(name):
    criterion, models = nn.CrossEntropyLoss(), [network(), network()]
    optimizers = [FIXED[name](model, criterion) for model in models]
    step(models[0], optimizers[0], *batch(), lambda: nn.utils.clip_grad_norm_(models[0].parameters(), 0.01))

    def by_hand():
        grads = [p.grad for p in models[1].parameters()]
        norm = torch.cat([g.flatten() for g in grads]).norm()
        for g in grads:
            g.mul_(0.01 / norm)

    torch.manual_seed(3)
    first = parameters(models[0])
    if not name.startswith("KFAC"):  # its labels are random
        step(models[1], optimizers[1], *batch(), by_hand)
        torch.testing.assert_close(parameters(models[1]), first, rtol=1e-4, atol=1e-6)
    assert 0 < (first - parameters(network())).abs().max() < 0.2


# --- dtypes ----------------------------------------------------------------------------------------------------------------


@every
def test_autocast_trains(name):
    model = network(torch.float32)
    optimizer = ALL[name](model, nn.CrossEntropyLoss(), **({"lr": 0.01} if name in FIXED else {}))
    x, y = batch(m=40, dtype=torch.float32)

    def closure():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = optimizer.criterion(model(x), y)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(15)]
    assert losses[-1] < losses[0]
    assert {v.dtype for v in tree_leaves(dict(optimizer.state)) if isinstance(v, torch.Tensor)} == {torch.float32}


@every
def test_bfloat16_parameters_with_float32_state_resume_to_the_bit(name):
    criterion, straight = nn.CrossEntropyLoss(), network(torch.bfloat16)
    kwargs = {"lr": 0.01} if name in FIXED and not name.startswith("KBFGS") else {}
    optimizer = ALL[name](straight, criterion, **kwargs)
    losses = train(straight, optimizer, [0] * 6, m=40, dtype=torch.bfloat16)
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.bfloat16 for p in straight.parameters())
    assert {v.dtype for v in tree_leaves(dict(optimizer.state)) if isinstance(v, torch.Tensor)} == {torch.float32}
    saved = reloaded((straight.state_dict(), optimizer.state_dict()), map_location="cpu")
    resumed = network(torch.bfloat16)
    resumed.load_state_dict(saved[0])
    other = ALL[name](resumed, criterion, **kwargs)
    other.load_state_dict(saved[1])
    assert_same(everything(straight, optimizer), everything(resumed, other))
    loaded = copy.deepcopy(saved[1])
    for model, each in ((straight, optimizer), (resumed, other)):
        train(model, each, range(3), m=40, dtype=torch.bfloat16)
    assert_same(everything(straight, optimizer), everything(resumed, other))
    assert_same(saved[1], loaded)  # training changes nothing of what was loaded


# --- param_groups, schedulers, hooks -----------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=6),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)]),
}  # fmt: skip


def test_all_of_torchs_schedulers_are_here():
    names = {n for n, c in vars(lr_scheduler).items() if isinstance(c, type) and issubclass(c, lr_scheduler.LRScheduler)}
    assert names - {"LRScheduler", "_LRScheduler", "SWALR"} == SCHEDULERS.keys()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@fixed
def test_every_scheduler_sets_the_step(name, scheduler):
    model = network()
    optimizer = FIXED[name](model, nn.CrossEntropyLoss(), **({} if name.startswith("KBFGS") else {"factor_decay": 0.0}))
    sgd = torch.optim.SGD(network().parameters(), lr=0.1, momentum=optimizer.param_groups[0]["momentum"])
    schedules = [SCHEDULERS[scheduler](o) for o in (optimizer, sgd)]
    for seed in range(5):
        step(model, optimizer, *batch(seed))
        sgd.step()
        for schedule in schedules:
            schedule.step(*[1.0] if scheduler == "ReduceLROnPlateau" else [])
        assert optimizer.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]
        assert optimizer.param_groups[0]["momentum"] == sgd.param_groups[0]["momentum"]
    optimizer.param_groups[0]["lr"] = 0.0
    before = parameters(model)
    step(model, optimizer, *batch(9))
    assert torch.equal(parameters(model), before)


found = pytest.mark.parametrize("name", [name for name in ALL if name not in FIXED])  # those that find their own step


@found
@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name not in ("CyclicLR", "OneCycleLR")])
def test_every_scheduler_multiplies_the_step_that_is_found(name, scheduler):
    models = [network(), network()]
    scheduled, by_hand = (ALL[name](model, nn.CrossEntropyLoss()) for model in models)
    sgd = torch.optim.SGD(network().parameters(), lr=1.0)
    schedules = [SCHEDULERS[scheduler](o) for o in (scheduled, sgd)]
    for seed in range(4):
        if name != "KFAC" or seed == 0:  # whose labels are drawn anew
            by_hand.param_groups[0]["lr"] = sgd.param_groups[0]["lr"]
            assert train(models[0], scheduled, [seed]) == train(models[1], by_hand, [seed])
        sgd.step()
        for schedule in schedules:
            schedule.step(*[1.0] if scheduler == "ReduceLROnPlateau" else [])
        assert scheduled.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]
    assert torch.equal(parameters(models[0]), parameters(models[1]))


@found
def test_the_learning_rate_multiplies_the_first_step_exactly(name):
    steps = {}
    for lr in (1.0, 0.25, 0.0):
        model = network()
        before = parameters(model)
        damping = {"tau": 10.0} if name == "KFAC" else {}  # so large that the whole step is accepted, too
        optimizer = ALL[name](model, nn.CrossEntropyLoss(), lr=lr, **damping)
        train(model, optimizer, [0])
        steps[lr] = parameters(model) - before
    assert steps[1.0].abs().max() > 0
    torch.testing.assert_close(steps[0.25], 0.25 * steps[1.0])
    assert steps[0.0].abs().max() == 0


@found
@pytest.mark.parametrize("lr", [2.0, -0.1, float("nan"), None])
def test_a_learning_rate_that_cannot_multiply_a_step_is_refused(name, lr):
    model = network()
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    optimizer.param_groups[0]["lr"] = lr
    before = parameters(model)
    for refuse in (lambda: train(model, optimizer, [0]), lambda: ALL[name](network(), nn.CrossEntropyLoss(), lr=lr)):
        with pytest.raises((ValueError, TypeError), match=r"expected lr (in \[0, 2\), since it multiplies|to be a number)"):
            refuse()
    assert torch.equal(parameters(model), before)


@pytest.mark.parametrize("name", [name for name in ALL if name not in FIXED])
def test_the_learning_rate_of_another_optimizer_is_warned_of(name):
    with pytest.warns(UserWarning, match=f"{name}: lr=0.001 multiplies the step that .* by itself, .* 1,000 times shorter"):
        ALL[name](network(), nn.CrossEntropyLoss(), lr=1e-3)
    ALL[name](network(), nn.CrossEntropyLoss(), lr=0.0)
    ALL[name](network(), nn.CrossEntropyLoss(), lr=0.02)


@every
def test_the_signature_of_forward_stays(name):
    class Net(nn.Sequential):
        def forward(self, pixels, *, mask=None):
            return super().forward(pixels)

    model = Net(nn.Linear(5, 3))
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    assert list(inspect.signature(model.forward).parameters) == ["pixels", "mask"]
    assert inspect.signature(copy.deepcopy(model).forward) == inspect.signature(model.forward)
    optimizer.remove_hooks()
    assert inspect.signature(model.forward) == inspect.signature(Net(nn.Linear(5, 3)).forward)


def test_eacg_without_a_learning_rate_names_the_optimizer_that_finds_it():
    with pytest.raises(ValueError, match=r"expected lr >= 0, got None; .* secondorder.LayerwiseNewton\(model, criterion\)"):
        so.EACG(network(), nn.CrossEntropyLoss(), lr=None)


@every
@pytest.mark.parametrize("argument", ["foreach", "fused", "capturable", "differentiable"])
def test_arguments_that_would_do_nothing_are_refused(name, argument):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{argument}'"):
        ALL[name](network(), nn.CrossEntropyLoss(), **{argument: True})


@pytest.mark.parametrize("name", kinds.NAMES)
def test_a_step_within_the_capture_of_a_cuda_graph_is_refused(name, monkeypatch):
    model, optimizer, step = kinds.made(name)
    step()
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=rf"{name}.step\(\): expected no capture of a CUDA graph"):
        optimizer.step(lambda: pytest.fail("the closure was called"))
    monkeypatch.undo()
    assert_same([model.state_dict(), optimizer.state_dict()], before)


@every
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_copies_of_model_and_optimizer_train_alike(name, how, scheduled):
    model = network()
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    if scheduled:
        lr_scheduler.StepLR(optimizer, 10)
    train(model, optimizer, range(3))
    twin, twin_optimizer = how((model, optimizer))
    assert train(model, optimizer, range(3, 6)) == train(twin, twin_optimizer, range(3, 6))
    assert_same(everything(model, optimizer), everything(twin, twin_optimizer))


@every
def test_step_hooks(name):
    model, seen = network(), []
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    handles = [
        optimizer.register_step_pre_hook(lambda *_: seen.append(("before", parameters(model)))),
        optimizer.register_step_post_hook(lambda *_: seen.append(("after", parameters(model)))),
    ]
    train(model, optimizer, [0])
    assert [when for when, _ in seen] == ["before", "after"]
    assert torch.equal(seen[0][1], parameters(network()))
    assert torch.equal(seen[1][1], parameters(model))
    for handle in handles:
        handle.remove()
    train(model, optimizer, [1])
    assert len(seen) == 2


@every
def test_unfreezing_by_add_param_group(name):
    model = network()
    model[0].requires_grad_(False)
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    train(model, optimizer, range(2))
    assert torch.equal(model[0].weight, network()[0].weight)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters()})
    train(model, optimizer, range(2))
    assert not torch.equal(model[0].weight, network()[0].weight)
    with pytest.raises(ValueError, match="parameters of the model, or of the criterion, that the optimizer was made for, got 6"):
        optimizer.add_param_group({"params": network().parameters()})
    assert len(optimizer.param_groups) == 2


def test_repr_tells_the_curvatures():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(1, 2, 1), nn.Flatten(), nn.Linear(10, 6), nn.LayerNorm(6), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)
    )
    model.append(nn.Linear(3, 3).requires_grad_(False))
    optimizer = so.LayerwiseNewton(model, nn.CrossEntropyLoss())
    optimizer.criterion(model(torch.randn(8, 1, 5)), torch.randint(3, (8,))).backward()
    with pytest.warns(UserWarning):
        optimizer.step()
    lines = repr(optimizer).splitlines()
    assert "2 (10 -> 6): empirical Fisher, since its output goes through a function that is not elementwise" in "\n".join(lines)
    assert "4 (6 -> 4): pch-abs by auto" in lines
    assert "7 (3 -> 3): frozen" in lines
    assert lines[-1] == "fallback (SGD): 0.weight, 0.bias, 3.weight, 3.bias"
    assert "0 (5 -> 7): quasi-Newton" in repr(so.KBFGS(network(), nn.CrossEntropyLoss()))


# --- torch.compile -----------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.c, self.function = nn.Linear(5, 7), nn.Linear(7, 4), nn.Linear(4, 3), function

    def forward(self, x):
        return self.c(self.function(self.b(self.function(self.a(x)))))

    def __getitem__(self, index):
        return self.a


@every
@pytest.mark.parametrize("how", ["around", "inside", "method"])
@pytest.mark.parametrize("function", [torch.tanh, F.mish])
def test_a_compiled_model_trains_as_ever(name, how, function):
    criterion, results = nn.CrossEntropyLoss(), []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        own = called = given = Plain(function).double()
        if compiled and how == "method":
            own.compile(backend="aot_eager")
        elif compiled:
            called = torch.compile(own, backend="aot_eager")
            given = called if how == "around" else own
        optimizer = ALL[name](given, criterion)
        torch.manual_seed(3)
        for seed in range(3):
            step(_Called(called, own), optimizer, *batch(seed))
        results.append(parameters(own))
    assert torch.equal(*results)


class _Called:
    def __init__(self, called, own):
        self.called, self.own = called, own

    def __call__(self, x):
        return self.called(x)

    def __getitem__(self, index):
        return self.own[index]


def test_evaluation_is_compiled_as_one_graph():
    torch.compiler.reset()
    model = network()
    optimizer = so.LayerwiseNewton(model, nn.CrossEntropyLoss())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, _ = batch()
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))
    optimizer.remove_hooks()
    assert "forward" not in vars(model)


def test_a_compiled_part_of_the_model_does_not_pass_for_the_whole():
    model = network()
    optimizer = so.EACG(model, nn.CrossEntropyLoss(), lr=0.1)
    x, y = batch()
    torch.compiler.reset()
    part = torch.compile(lambda x: model[2](torch.tanh(model[0](x))), backend="aot_eager")
    with pytest.raises(RuntimeError, match="inside a compiled graph"):
        optimizer.criterion(model[4](torch.tanh(part(x))), y)
    function = torch.compile(torch.tanh, backend="aot_eager")
    with pytest.raises(RuntimeError, match="what follows layer '0' runs inside a compiled graph"):
        model[2](function(model[0](x)))
    with pytest.raises(RuntimeError, match="the criterion, or what comes before it, runs inside a compiled graph"):
        optimizer.criterion(function(model(x)), y)


# --- faults ------------------------------------------------------------------------------------------------------------------


def poison_input(model, x, y):
    x[2, 3] = float("nan")


def poison_gradient(model, x, y):
    def hook(gradient):
        handle.remove()
        return gradient.index_fill(0, torch.tensor([1]), float("inf"))

    handle = model[2].weight.register_hook(hook)


def huge_input(model, x, y):
    x.fill_(1e200)  # finite; its second moments are not


@every
@pytest.mark.parametrize("poison", [poison_input, poison_gradient, huge_input])
def test_nonfinite_is_raised_or_skipped_and_counted(name, poison):
    for how in ("error", "skip"):
        model = network()
        optimizer = ALL[name](model, nn.CrossEntropyLoss(), nonfinite=how)
        train(model, optimizer, range(2))
        x, y = batch(5)
        poison(model, x, y)
        before = everything(model, optimizer)
        try:
            step(model, optimizer, x, y)
        except so.NonFiniteError:
            assert how == "error"
            assert_same(everything(model, optimizer), before)
        else:
            if how == "skip" and optimizer.skipped_steps:
                assert_same(everything(model, optimizer), before)
                assert optimizer.skipped_steps == 1
            else:
                assert poison is huge_input  # whose direction may well be finite
        assert torch.isfinite(parameters(model)).all()
        for seed in range(3):
            step(model, optimizer, *batch(seed))
        assert torch.isfinite(parameters(model)).all()


@pytest.mark.parametrize("name", ["EACG", "KBFGS"])
def test_nonfinite_is_checked_at_construction(name):
    with pytest.raises(ValueError, match="expected nonfinite 'error' or 'skip', got 'ignore'"):
        FIXED[name](network(), nn.CrossEntropyLoss(), nonfinite="ignore")


@every
def test_an_exception_between_backward_and_step(name):
    criterion, models = nn.CrossEntropyLoss(), [network(), network()]
    optimizers = [ALL[name](model, criterion) for model in models]

    def fail():
        raise KeyboardInterrupt

    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(2))
        if model is models[0]:
            with pytest.raises(KeyboardInterrupt):
                step(model, optimizer, *batch(7), fail)
        train(model, optimizer, range(2, 4))
    assert_same(everything(models[0], optimizers[0]), everything(models[1], optimizers[1]))


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("KFAC")])  # its labels are of torch's one generator
def test_two_threads_train_as_one_after_the_other(name):
    def run(model, optimizer):
        for seed in range(10):
            step(model, optimizer, *batch(seed))

    pairs = []
    for parallel in (False, True):
        models = [network(), network()]
        threads = [threading.Thread(target=run, args=(m, ALL[name](m, nn.CrossEntropyLoss()))) for m in models]
        for thread in threads:
            thread.start()
            if not parallel:
                thread.join()
        for thread in threads:
            thread.join()
        pairs.append([parameters(model) for model in models])
    assert_same(pairs[0], pairs[1])


@every
def test_same_seed_same_bits(name):
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 129), nn.Tanh(), nn.Dropout(), nn.Linear(129, 3))
        optimizer = ALL[name](model, nn.CrossEntropyLoss())
        train(model, optimizer, range(5), m=300, dtype=torch.float32)
        runs.append(everything(model, optimizer))
    assert_same(*runs)


# --- processes -----------------------------------------------------------------------------------------------------------------

SAVES_FOREVER = """
import os, sys, torch
from torch import nn
import secondorder as so
model = nn.Sequential(nn.Linear(2000, 500), nn.Tanh(), nn.Linear(500, 3))
optimizer = so.LayerwiseNewton(model, nn.CrossEntropyLoss())
optimizer.criterion(model(torch.randn(8, 2000)), torch.randint(3, (8,))).backward()
optimizer.step()
path = sys.argv[1]
while True:
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path + ".new")
    os.replace(path + ".new", path)
    print("saved", flush=True)
"""


def test_a_kill_while_saving_leaves_a_loadable_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    process = subprocess.Popen(
        [sys.executable, "-c", SAVES_FOREVER, str(path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    try:
        assert process.stdout.readline() == b"saved\n"
        for attempt in range(20):  # stopped where it stands, it leaves what a kill there leaves
            time.sleep(0.003 * attempt)
            process.send_signal(signal.SIGSTOP)
            saved = torch.load(path, weights_only=True)
            assert saved["optimizer"]["state"][0]["factors"]["bias_hessian"].shape == (500, 500)
            process.send_signal(signal.SIGCONT)
    finally:
        process.kill()
        process.communicate()  # waits, and closes the pipe
    torch.load(path, weights_only=True)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
@every
def test_workers_of_a_data_loader_by_fork(name):
    def run(workers):
        model = network()
        optimizer = ALL[name](model, nn.CrossEntropyLoss())
        x, y = batch(m=40)
        context = "fork" if workers else None
        data = torch.utils.data.TensorDataset(x, y)
        for _ in range(2):
            for batch_x, batch_y in torch.utils.data.DataLoader(data, 8, num_workers=workers, multiprocessing_context=context):
                step(model, optimizer, batch_x, batch_y)
        return parameters(model)

    assert torch.equal(run(0), run(2))


# --- checkpoints of before version 0.2 -----------------------------------------------------------------------------------


# Written by 0.1: a model and its optimizer after the batches 0 to 6, and the model after 7 to 10.
CHECKPOINTS = torch.load(Path(__file__).with_name("checkpoints_0_1.pt"), weights_only=True)
CONTINUED = {
    "EACG": lambda m, c: so.EACG(m, c, 0.1, curvature_every=2, weight_decay=0.01),
    "LayerwiseNewton": lambda m, c: so.LayerwiseNewton(m, c, weight_decay=0.01),
    "LayerwiseNewton, exact": lambda m, c: so.LayerwiseNewton(m, c, solver="exact", average=True),
    "KFRA": so.KFRA,
    "KFLR": so.KFLR,
    "KBFGS": lambda m, c: so.KBFGS(m, c, scale=None, max_step=None),
}


def continued(name, make):
    """The model after the batches 7 to 10, from version 0.1's checkpoint."""
    model, saved = network(), CHECKPOINTS[name]
    model.load_state_dict(saved["model"])
    optimizer = make(model, nn.CrossEntropyLoss())
    optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    for seed in range(7, 11):
        step(model, optimizer, *batch(seed))
    return model.state_dict()


@pytest.mark.parametrize("name", CONTINUED)
def test_a_checkpoint_of_0_1_goes_on_as_it_would_have(name):
    for key, value in continued(name, CONTINUED[name]).items():
        torch.testing.assert_close(value, CHECKPOINTS[name]["after"][key], rtol=1e-9, atol=1e-12)


def test_the_dampings_of_0_1_are_those_that_go_on():
    saved = CHECKPOINTS["LayerwiseNewton"]["optimizer"]
    optimizer = so.LayerwiseNewton(network(), nn.CrossEntropyLoss())
    optimizer.load_state_dict(copy.deepcopy(saved))
    (before,), (after,) = saved["param_groups"], optimizer.param_groups
    assert after["loss_trend"] == before["watch"]
    assert [after[key] for key in ("tau", "gamma", "rho")] == [before[key] for key in ("tau", "gamma", "rho")]


def test_what_0_1_kept_for_conjugate_gradients_is_not_used():
    """It kept the factors of up to `inverse_every` steps ago, as if they had been a factorisation."""
    kept, fresh = (
        continued("EACG, kron-cg", lambda m, c, n=n: so.EACG(m, c, 0.1, solver="kron-cg", inverse_every=n, curvature_every=2))
        for n in (5, 1)
    )
    assert_same(kept, fresh)


def test_a_checkpoint_of_the_other_kind_of_step_says_where_it_belongs():
    model, criterion = network(), nn.CrossEntropyLoss()
    found, given = so.LayerwiseNewton(model, criterion), so.EACG(network(), criterion)
    for saved in (found.state_dict(), CHECKPOINTS["LayerwiseNewton"]["optimizer"]):
        with pytest.raises(ValueError, match=r"got one of an optimizer that finds its own step.*secondorder\.LayerwiseNewton"):
            given.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"got one of an optimizer with a learning rate; load it into secondorder\.EACG"):
        found.load_state_dict(given.state_dict())


def test_a_state_of_another_solver_is_refused_at_once():
    model = network()
    saved = so.EACG(network(), nn.CrossEntropyLoss(), solver="ea-cg").state_dict()
    optimizer = so.EACG(model, nn.CrossEntropyLoss(), solver="kfi")
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="EACG.load_state_dict.*: expected the state of the solver KFI, got one of EACGSolver"):
        optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict(), before)


@pytest.mark.parametrize("name", [name for name in so.optim.__all__ if name not in FIXED and name not in OTHERS])
def test_one_learning_rate_multiplies_one_step(name):
    model = network()
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    weights = [model[0].weight, model[2].weight]
    optimizer.param_groups[0]["params"] = [p for p in model.parameters() if all(p is not w for w in weights)]
    optimizer.add_param_group({"params": weights, "lr": 0.5})
    before = parameters(model)
    with pytest.raises(ValueError, match="expected lr to be the same in all param_groups"):
        train(model, optimizer, [0])
    assert torch.equal(parameters(model), before)


def test_a_step_of_zero_keeps_the_previous_step():
    model = network()
    optimizer = so.LayerwiseNewton(model, nn.CrossEntropyLoss())
    train(model, optimizer, range(3))
    previous = optimizer.state[model[0].weight]["momentum"].clone()
    assert previous.abs().max() > 0
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, [3])
    assert torch.equal(optimizer.state[model[0].weight]["momentum"], previous)


def test_a_failed_step_under_grad_scaler_can_be_tried_again():
    model, (x, y) = network(), batch()
    optimizer, scaler = so.EACG(model, nn.CrossEntropyLoss()), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(optimizer.criterion(model(x), y)).backward()
    gradient = model[0].weight.grad.clone()
    losses, optimizer._tape._log.losses = optimizer._tape._log.losses, []
    with pytest.raises(RuntimeError, match="no call of the criterion"):
        scaler.step(optimizer)
    assert torch.equal(model[0].weight.grad, gradient)
    optimizer._tape._log.losses = losses
