"""What people do with any torch optimizer, done with every one of the package: losses, dtypes, copies, hooks and groups."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from helpers import kinds
from helpers.captures import capturing
from helpers.habits import batch, every, everything, fixed, network, reloaded, step, train
from helpers.optimizers import ALL, FIXED, parameters
from helpers.training import assert_same
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils._pytree import tree_leaves

import secondorder as so


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


@pytest.mark.parametrize("name", kinds.NAMES)
def test_another_default_device_changes_nothing(name):
    """Such as that of scripts that begin by torch.set_default_device("cuda")."""
    ends = []
    for device in ("cpu", "meta"):
        model, _, step = kinds.made(name)
        with torch.device(device):
            for _ in range(4):
                step()
        ends.append(parameters(model))
    assert torch.equal(*ends)


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
    if argument in inspect.signature(type(ALL[name](network(), nn.CrossEntropyLoss()))).parameters:  # EigenAdam and EACG
        return
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{argument}'"):
        ALL[name](network(), nn.CrossEntropyLoss(), **{argument: True})


@every
@pytest.mark.parametrize("value", ["no", 1, None])
def test_flags_are_true_or_false(name, value):
    parameters = inspect.signature(type(ALL[name](network(), nn.CrossEntropyLoss()))).parameters.values()
    flags = [p.name for p in parameters if isinstance(p.default, bool)]
    assert flags
    for flag in flags:
        with pytest.raises(ValueError, match=f"expected {flag} to be True or False, got {value!r}"):
            ALL[name](network(), nn.CrossEntropyLoss(), **{flag: value})


@pytest.mark.parametrize("optimizer", [so.EACG, so.LayerwiseNewton, so.KFAC, so.KBFGS])
def test_model_and_criterion_exchanged(optimizer):
    with pytest.raises(ValueError, match="expected a model, and then its criterion, got CrossEntropyLoss as the model"):
        optimizer(nn.CrossEntropyLoss(), network())


@pytest.mark.parametrize("name", kinds.NAMES)
def test_a_step_within_the_capture_of_a_cuda_graph_is_refused(name):
    model, optimizer, step = kinds.made(name)
    step()
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    with capturing(), pytest.raises(RuntimeError, match=rf"{name}.step\(\): expected no capture of a CUDA graph"):
        optimizer.step(lambda: pytest.fail("the closure was called"))
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


def test_a_state_of_another_solver_is_refused_at_once():
    model = network()
    saved = so.EACG(network(), nn.CrossEntropyLoss(), solver="ea-cg").state_dict()
    optimizer = so.EACG(model, nn.CrossEntropyLoss(), solver="kfi")
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="EACG.load_state_dict.*: expected the state of the solver KFI, got one of EACGSolver"):
        optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict(), before)


@pytest.mark.parametrize("name", [*ALL, "EigenAdam", "LevenbergMarquardt"])
def test_the_signature_of_step_says_who_needs_a_closure(name):
    model = nn.Linear(3, 2)
    optimizer = ALL[name](model, nn.MSELoss()) if name in ALL else getattr(so, name)(model.parameters())
    needs = inspect.signature(optimizer.step).parameters["closure"].default is inspect.Parameter.empty
    assert needs == (name in ("KBFGS", "KBFGSL", "LevenbergMarquardt"))
    assert inspect.signature(torch.optim.LBFGS.step).parameters["closure"].default is inspect.Parameter.empty  # as torch's own
    if needs:
        for call in (optimizer.step, lambda: optimizer.step(None)):
            with pytest.raises(RuntimeError, match="expected a closure, since"):
                call()
