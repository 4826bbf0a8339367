"""EACG as a torch optimizer: steps against dense matrices, habits, and bad input."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from helpers.training import WIDTHS, assert_same, batch, network, one_step, poison_gradient, poison_input, snapshot
from oracles import eacg_matrix, pch_by_loops, textbook_cg
from torch import nn
from torch.nn import functional as F

import secondorder as so
from secondorder.criteria import BoundedClassificationLoss
from secondorder.curvature import PCH
from secondorder.solvers import EACGSolver


def dense_directions(model, criterion, x, y, gamma, alpha, iterations=None, factors=None):
    """Each layer's (P, d) from assembled matrices; `factors` collects (H, a) to average outside."""
    linears = [layer for layer in model if isinstance(layer, nn.Linear)]
    m = len(x)
    blocks = pch_by_loops(
        [layer.weight.detach() for layer in linears],
        [torch.zeros(layer.out_features).double() if layer.bias is None else layer.bias.detach() for layer in linears],
        [torch.sigmoid] * (len(linears) - 1),
        lambda z, i: criterion(z[None], y[i : i + 1]) / m,
        x,
        gamma,
    )
    parameters = list(model.parameters())
    grads = dict(zip(parameters, torch.autograd.grad(criterion(model(x), y), parameters), strict=True))
    h, result = x, []
    for i, (layer, block) in enumerate(zip(linears, blocks, strict=True)):
        a = h.mean(0)
        if factors is not None:
            block, a = factors(i, block, a)
        matrix, rhs = eacg_matrix(block, a, alpha), -grads[layer.weight].reshape(-1)
        p = torch.linalg.solve(matrix, rhs) if iterations is None else textbook_cg(matrix, rhs, iterations)
        d = None
        if layer.bias is not None:
            shifted = (1 - alpha) * block + alpha * torch.eye(len(block)).double()
            d = (
                torch.linalg.solve(shifted, -grads[layer.bias])
                if iterations is None
                else textbook_cg(shifted, -grads[layer.bias], iterations)
            )
        result.append((p.reshape(layer.weight.shape), d))
        h = torch.sigmoid(layer(h)).detach()
    return result


def assert_moved(model, before, directions, lr):
    linears = [layer for layer in model if isinstance(layer, nn.Linear)]
    for layer, old, (p, d) in zip(linears, [m for m in before if isinstance(m, nn.Linear)], directions, strict=True):
        torch.testing.assert_close(layer.weight.detach(), old.weight.detach() + lr * p, rtol=1e-8, atol=1e-10)
        if d is not None:
            torch.testing.assert_close(layer.bias.detach(), old.bias.detach() + lr * d, rtol=1e-8, atol=1e-10)


CRITERIA = [nn.CrossEntropyLoss(), BoundedClassificationLoss()]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("criterion", CRITERIA, ids=["cross-entropy", "eq14"])
@pytest.mark.parametrize(("curvature", "gamma"), [("pch-abs", -1.0), ("pch-clip-all", 0.0), (PCH(-0.4), -0.4)])
def test_a_step_is_the_dense_step(curvature, gamma, criterion, bias):
    model, (x, y) = network(bias), batch()
    before = copy.deepcopy(model)
    optimizer = so.EACG(model, criterion, lr=0.3, curvature=curvature, alpha=0.1, max_cg=500, eps_cg=1e-13)
    one_step(model, criterion, optimizer, x, y)
    assert_moved(model, before, dense_directions(before, criterion, x, y, gamma, 0.1), 0.3)


@pytest.mark.parametrize("iterations", [1, 3, 5])
def test_the_papers_truncated_step(iterations):
    criterion, model, (x, y) = nn.CrossEntropyLoss(), network(), batch()
    before = copy.deepcopy(model)
    optimizer = so.EACG(
        model, criterion, lr=0.1, alpha=0.02, solver="ea-cg-truncated", max_cg=iterations, eps_cg=0, momentum=0, factor_decay=0,
        max_step=None,
    )  # fmt: skip
    one_step(model, criterion, optimizer, x, y)
    directions = dense_directions(before, criterion, x, y, -1.0, 0.02, iterations)
    # CG on the small systems ends early: textbook CG then stands at the solution too.
    assert_moved(model, before, directions, 0.1)


def test_momentum_weight_decay_and_factor_averages():
    criterion, model = nn.CrossEntropyLoss(), network()
    optimizer = so.EACG(
        model, criterion, lr=0.2, alpha=0.1, max_cg=500, eps_cg=1e-13, momentum=0.8, weight_decay=0.3, factor_decay=0.6,
        max_step=None,
    )  # fmt: skip
    sums, velocity = {}, None
    for step in range(1, 5):
        x, y = batch(seed=step)

        def average(i, block, a):
            # The raw average and its bias correction, as one writes them down.
            old = sums.get(i, (0, 0))
            sums[i] = tuple(0.6 * o + 0.4 * n for o, n in zip(old, (block, a), strict=True))
            return tuple(s / (1 - 0.6**step) for s in sums[i])  # noqa: B023

        before = copy.deepcopy(model)
        directions = dense_directions(before, criterion, x, y, -1.0, 0.1, factors=average)
        velocity = directions if velocity is None else [
            (0.8 * v[0] + p, 0.8 * v[1] + d) for v, (p, d) in zip(velocity, directions, strict=True)
        ]  # fmt: skip
        one_step(model, criterion, optimizer, x, y)
        with torch.no_grad():
            for parameter in before.parameters():
                parameter.mul_(1 - 0.2 * 0.3)
        assert_moved(model, before, velocity, 0.2)


def test_curvature_every():
    criterion, model = nn.CrossEntropyLoss(), network()
    optimizer = so.EACG(model, criterion, lr=0.1, curvature_every=3)
    weight = model[0].weight
    seen, recording = [], []
    for step in range(10):
        x, y = batch(seed=step)
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        recording.append(bool(model[0](x).grad_fn.metadata))
        loss.backward()
        optimizer.step()
        seen.append(optimizer.state[weight]["factors"]["bias_hessian"].clone())
    renewed = [True] + [not torch.equal(a, b) for a, b in zip(seen, seen[1:])]
    # At first every time, then every third.
    assert renewed == recording == [True, True, True, True, False, False, True, False, False, True]


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"lr": 0.02},
        {"lr": 0.2, "alpha": 0.1, "momentum": 0.0},
        {"lr": 0.02, "solver": "ea-cg-truncated", "curvature": "pch-clip", "alpha": 0.05},
    ],
)
@pytest.mark.parametrize("criterion", CRITERIA, ids=["cross-entropy", "eq14"])
def test_trains(criterion, kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.rand(200, 2) * 2 - 1
    y = (x[:, 0] * x[:, 1] > 0).long()
    optimizer = (so.EACG if kwargs else so.LayerwiseNewton)(model, criterion, **kwargs)
    first = one_step(model, criterion, optimizer, x, y)
    for _ in range(150):
        last = one_step(model, criterion, optimizer, x, y)
    assert last < first / 3
    assert (model(x).argmax(1) == y).float().mean() > 0.9


def test_a_function_as_criterion():
    model, (x, y) = network(), batch()
    twin = copy.deepcopy(model)
    module = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = so.EACG(model, lambda z, t: F.cross_entropy(z, t, label_smoothing=0.1), lr=0.02, eps_cg=1e-12, max_cg=500)
    one_step(model, optimizer.criterion, optimizer, x, y)
    one_step(twin, module, so.EACG(twin, module, lr=0.02, eps_cg=1e-12, max_cg=500), x, y)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_closure():
    criterion, model, (x, y) = nn.CrossEntropyLoss(), network(), batch()
    optimizer = so.LayerwiseNewton(model, criterion)

    def closure():
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    expected = criterion(model(x), y).item()
    assert optimizer.step(closure).item() == expected
    assert criterion(model(x), y).item() < expected


def test_param_groups_are_read_at_every_step():
    criterion, model, (x, y) = nn.CrossEntropyLoss(), network(), batch()
    optimizer = so.EACG(model, criterion, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    one_step(model, criterion, optimizer, x, y)
    scheduler.step()
    before = copy.deepcopy(list(model.parameters()))
    one_step(model, criterion, optimizer, x, y)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    optimizer.param_groups[0]["alpha"] = 2.0
    with pytest.raises(ValueError, match=r"expected alpha in \(0, 1\), got 2"):
        one_step(model, criterion, optimizer, x, y)


def test_state_dict_resumes_to_the_bit():
    criterion = nn.CrossEntropyLoss()

    def run(model, optimizer, steps):
        for step in steps:
            one_step(model, criterion, optimizer, *batch(seed=step))

    straight = network()
    run(straight, so.LayerwiseNewton(straight, criterion, curvature_every=2), range(7))
    for stop in (1, 2, 4):
        first = network()
        optimizer = so.LayerwiseNewton(first, criterion, curvature_every=2)
        run(first, optimizer, range(stop))
        file = io.BytesIO()
        torch.save((first.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        model_state, optimizer_state = torch.load(file, weights_only=True)
        second = network()
        second.load_state_dict(model_state)
        resumed = so.LayerwiseNewton(second, criterion, curvature_every=2)
        resumed.load_state_dict(optimizer_state)
        run(second, resumed, range(stop, 7))
        assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))


class Mixed(nn.Module):
    """A convolution and a norm before two linear layers, and a parameter of the model's own."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 2, 3), nn.LayerNorm(6)
        self.hidden, self.frozen, self.out = nn.Linear(6, 5), nn.Linear(5, 5).requires_grad_(False), nn.Linear(5, 3)
        self.shift = nn.Parameter(torch.zeros(5))

    def forward(self, x):
        h = self.norm(torch.relu(self.conv(x.unsqueeze(1))).flatten(1))
        return self.out(torch.tanh(self.frozen(torch.tanh(self.hidden(h) + self.shift))))


def test_uncovered_parameters_get_the_fallback_and_one_warning():
    model, criterion, (x, y) = Mixed().double(), nn.CrossEntropyLoss(), batch()
    optimizer = so.EACG(model, criterion, lr=0.1, momentum=0.5, weight_decay=0.2)
    with pytest.warns(UserWarning, match="'shift', 'conv.weight', 'conv.bias', 'norm.weight', 'norm.bias'.*fallback, SGD"):
        one_step(model, criterion, optimizer, x, y)
    sgd = copy.deepcopy(model)
    reference = [p for n, p in sgd.named_parameters() if n.split(".")[0] in ("conv", "norm", "shift")]
    covered = [n for n, _ in model.named_parameters() if n.split(".")[0] in ("hidden", "out")]
    buffers = [p.grad.clone() for n, p in model.named_parameters() if n.split(".")[0] in ("conv", "norm", "shift")]
    before = {n: p.clone() for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_step(model, criterion, optimizer, x, y)
    sgd.zero_grad()
    criterion(sgd(x), y).backward()
    for p, buffer in zip(reference, buffers, strict=True):
        p.data = p.data * (1 - 0.1 * 0.2) - 0.1 * (0.5 * buffer + p.grad)
    for name, p in sgd.named_parameters():
        if name not in covered:
            torch.testing.assert_close(dict(model.named_parameters())[name], p)
    assert all(not torch.equal(before[n], dict(model.named_parameters())[n]) for n in covered)
    assert torch.equal(before["frozen.weight"], model.frozen.weight)
    strict = so.LayerwiseNewton(model, criterion, fallback="error")
    with pytest.raises(RuntimeError, match="no curvature covers the parameters 'shift'.*fallback='error'"):
        one_step(model, criterion, strict, x, y)


@pytest.mark.parametrize(
    "make", [lambda *a: so.EACG(*a, lr=0.1), so.LayerwiseNewton, so.KFRA, so.KBFGS], ids=["lr", "EACG", "KFRA", "KBFGS"]
)
def test_a_bias_of_two_layers_hides_no_other_parameter(make):
    class Scaled(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * self.scale

    model = Scaled(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5)).double()
    model[2].bias = model[0].bias
    model.scale = nn.Parameter(torch.full((5,), 2.0).double())
    criterion, x, y = nn.MSELoss(), torch.randn(9, 4).double(), torch.randn(9, 5).double()
    optimizer = make(model, criterion)
    before = model.scale.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="'scale'; they are updated by the fallback"):
        optimizer.step(closure)
    assert (model.scale != before).all()


def test_nothing_is_recorded_in_eval_mode_or_without_grad():
    criterion, model, (x, y) = nn.CrossEntropyLoss(), network(), batch()
    optimizer = so.LayerwiseNewton(model, criterion)
    one_step(model, criterion, optimizer, x, y)
    optimizer.zero_grad()
    with torch.no_grad():
        criterion(model(x), y)
    model.eval()
    criterion(model(x), y).backward()
    with pytest.raises(RuntimeError, match="no call of the criterion .* model in training mode"):
        optimizer.step()
    model.train()
    one_step(model, criterion, optimizer, x, y)


def trace(optimizer, layer):
    return float(optimizer.state[layer.weight]["factors"]["bias_hessian"].trace())


def traces_after(model, backward, **kwargs):
    """The traces of all bias Hessians after one step from what `backward(model, optimizer)` did."""
    optimizer = so.EACG(model, nn.CrossEntropyLoss(), **kwargs)
    backward(model, optimizer)
    optimizer.step()
    return torch.tensor([trace(optimizer, layer) for layer in model if isinstance(layer, nn.Linear)])


def plain(model, optimizer, factor=1.0, seed=0):
    x, y = batch(seed=seed)
    (factor * optimizer.criterion(model(x), y)).backward()


def two_batches_in_one_backward(model, optimizer):
    losses = [optimizer.criterion(model(batch(seed=s)[0]), batch(seed=s)[1]) for s in (0, 1)]
    (losses[0] + losses[1]).backward()


def two_batches_in_two(model, optimizer):
    plain(model, optimizer, seed=0)
    plain(model, optimizer, seed=1)


def two_losses_of_one_output(model, optimizer):
    x, y = batch()
    z = model(x)
    (0.25 * optimizer.criterion(z, y) + 0.75 * optimizer.criterion(z, y)).backward()


def after_autograd_grad(model, optimizer):
    x, y = batch()
    loss = optimizer.criterion(model(x), y)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    loss.backward()


def after_zeroed_gradients(set_to_none, frozen_head=False):
    def run(model, optimizer):
        plain(model, optimizer, seed=5)
        model[-1].requires_grad_(not frozen_head)
        model.zero_grad(set_to_none=set_to_none)  # not the optimizer's, which would know
        plain(model, optimizer)

    return run


def same_graph_after_zero_grad(model, optimizer):
    x, y = batch()
    loss = optimizer.criterion(model(x), y)
    loss.backward(retain_graph=True)
    optimizer.zero_grad()
    loss.backward()


def creating_a_graph(model, optimizer):
    x, y = batch()
    optimizer.criterion(model(x), y).backward(create_graph=True)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (two_batches_in_one_backward, two_batches_in_two),
        (two_losses_of_one_output, plain),
        (after_autograd_grad, plain),
        (after_zeroed_gradients(True), plain),
        (after_zeroed_gradients(False), plain),
        (same_graph_after_zero_grad, plain),
        (creating_a_graph, plain),
    ],
    ids=lambda f: f.__qualname__.split(".")[0],
)
def test_what_counts_as_a_backward_pass(run, expected):
    torch.testing.assert_close(traces_after(network(), run), traces_after(network(), expected))


def test_zero_grad_forgets():
    def skip_one(model, optimizer):
        plain(model, optimizer, seed=5)
        optimizer.zero_grad(set_to_none=False)
        for p in model.parameters():
            p.grad.add_(1e-30)  # so that only zero_grad itself can have told
        plain(model, optimizer)

    torch.testing.assert_close(traces_after(network(), skip_one), traces_after(network(), plain))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x, head):
        return getattr(self, head)(torch.tanh(self.trunk(x)))


def test_heads_trained_by_backward_passes_of_their_own():
    torch.manual_seed(0)
    model, criterion, (x, y) = TwoHeads().double(), nn.CrossEntropyLoss(), batch()
    optimizer = so.LayerwiseNewton(model, criterion)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no curvature covers.*")
        warnings.filterwarnings("ignore", message=".*is used in several places.*")
        for head in ("a", "b"):
            criterion(model(x, head), y).backward()
        optimizer.step()
    for layer in (model.trunk, model.a, model.b):
        assert trace(optimizer, layer) > 0


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_a_factor_on_the_loss_is_one_on_fisher_blocks_too(factor):
    def run(reduction, factor):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()
        criterion = nn.CrossEntropyLoss(reduction=reduction)
        optimizer = so.LayerwiseNewton(model, criterion)
        x, y = batch(11)
        (factor * criterion(model(x), y)).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        return torch.tensor([trace(optimizer, model[0]), trace(optimizer, model[3])])

    torch.testing.assert_close(run("mean", factor), factor * run("mean", 1.0))
    torch.testing.assert_close(run("sum", factor), 11 * factor * run("mean", 1.0))


def test_a_loss_that_is_maximised():
    """The criterion's Hessian is then negative, and Pos-Eig must see it: PCH-1 has the magnitude of the minimised loss's."""
    top = [traces_after(network(), lambda m, o, f=f: plain(m, o, f))[-1] for f in (1.0, -1.0)]
    torch.testing.assert_close(top[1], top[0])


def test_two_param_groups():
    criterion, model, (x, y) = nn.CrossEntropyLoss(), network(), batch()
    before = copy.deepcopy(model)
    optimizer = so.EACG(model, criterion, lr=0.3, alpha=0.1, max_cg=500, eps_cg=1e-13)
    head = list(model[4].parameters())
    optimizer.param_groups[0]["params"] = [p for p in model.parameters() if all(p is not h for h in head)]
    optimizer.add_param_group({"params": head, "lr": 0.01, "alpha": 0.4})
    one_step(model, criterion, optimizer, x, y)
    linears = [0, 2, 4]
    for lr, alpha, chosen in ((0.3, 0.1, (0, 1)), (0.01, 0.4, (2,))):
        directions = dense_directions(before, criterion, x, y, -1.0, alpha)
        for i in chosen:
            moved = model[linears[i]].weight.detach() - before[linears[i]].weight.detach()
            torch.testing.assert_close(moved, lr * directions[i][0], rtol=1e-8, atol=1e-10)


def test_parameters_outside_of_the_groups_are_left_alone():
    criterion, model, (x, y) = nn.CrossEntropyLoss(), network(), batch()
    optimizer = so.LayerwiseNewton(model, criterion)
    optimizer.param_groups[0]["params"] = list(model[4].parameters())
    before = model[0].weight.clone()
    one_step(model, criterion, optimizer, x, y)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("key", "value"), [("lr", 0.3), ("momentum", 0.2), ("weight_decay", 0.4), ("factor_decay", 0.3), ("alpha", 0.2)]
)
def test_a_number_set_in_the_group_is_one_given_at_construction(key, value):
    criterion, models = nn.CrossEntropyLoss(), [network(), network()]
    given = so.EACG(models[0], criterion, **{"lr": 0.02, key: value})
    changed = so.EACG(models[1], criterion, lr=0.02)
    changed.param_groups[0][key] = value
    for step in range(3):
        for model, optimizer in zip(models, (given, changed), strict=True):
            one_step(model, criterion, optimizer, *batch(seed=step))
    assert_same(models[0].state_dict(), models[1].state_dict())


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


def live_tensors():
    gc.collect()
    return {id(o): o for o in gc.get_objects() if type(o) is torch.Tensor and o.numel() > 8}


def test_no_memory_is_held_between_steps_nor_by_forward_passes_alone():
    criterion, model, (x, y) = nn.CrossEntropyLoss(), network(activation=nn.Mish), batch(50)
    optimizer = so.LayerwiseNewton(model, criterion)
    for _ in range(2):
        one_step(model, criterion, optimizer, x, y)
    optimizer.zero_grad()
    before = live_tensors()
    for _ in range(3):
        criterion(model(x), y)  # a forward pass that nobody goes backward through
    loss = criterion(model(x), y)  # held, with its graph, as training loops do
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    kept = [o.shape for i, o in live_tensors().items() if i not in before]
    assert not [shape for shape in kept if 50 in shape]


def test_a_discarded_backward_pass_is_forgotten():
    criterion = nn.CrossEntropyLoss()
    models = [network(), network()]
    optimizers = [so.LayerwiseNewton(model, criterion) for model in models]
    criterion(models[0](batch(seed=9)[0]), batch(seed=9)[1]).backward()
    models[0].zero_grad()  # not the optimizer's, which would know
    for model, optimizer in zip(models, optimizers, strict=True):
        criterion(model(batch()[0]), batch()[1]).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_two_backward_passes_through_one_graph():
    criterion, model, (x, y) = nn.CrossEntropyLoss(), network(), batch()
    twin = copy.deepcopy(model)
    optimizer, other = so.LayerwiseNewton(model, criterion), so.LayerwiseNewton(twin, criterion)
    loss = criterion(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    (2 * criterion(twin(x), y)).backward()
    optimizer.step()
    other.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_copies_of_the_model_are_not_recorded():
    criterion, model, (x, y) = nn.CrossEntropyLoss(), network(), batch()
    optimizer = so.LayerwiseNewton(model, criterion)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not clone(x).grad_fn.metadata
    one_step(model, criterion, optimizer, x, y)


def test_hooks_go_with_the_optimizer():
    criterion, model, (x, y) = nn.CrossEntropyLoss(), network(), batch()
    traces = {"forward", "_compiled_call_impl"}
    hooks = lambda: sum(len(traces & vars(m).keys()) for m in [*model.modules(), criterion])  # noqa: E731
    optimizer = so.LayerwiseNewton(model, criterion)
    assert hooks() == 6
    optimizer.remove_hooks()
    assert hooks() == 0
    optimizer = so.LayerwiseNewton(model, criterion)
    one_step(model, criterion, optimizer, x, y)
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    assert hooks() == 0


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
        ({"max_cg": 0}, "expected max_cg >= 1, got 0"),
        ({"eps_cg": -1.0}, "expected eps_cg >= 0"),
        ({"momentum": 1.0}, r"expected momentum in \[0, 1\), got 1.0"),
        ({"weight_decay": -1.0}, "expected weight_decay >= 0"),
        ({"factor_decay": 1.0}, r"expected factor_decay in \[0, 1\)"),
        ({"curvature_every": 0}, "expected curvature_every >= 1"),
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


def test_a_non_elementwise_function_warns_once_and_trains():
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()
    criterion, (x, y) = nn.CrossEntropyLoss(), batch()
    optimizer = so.LayerwiseNewton(model, criterion)
    with pytest.warns(UserWarning) as caught:
        losses = [one_step(model, criterion, optimizer, x, y) for _ in range(10)]
    messages = [str(w.message) for w in caught]
    assert sum("layer '0' goes through a function that is not elementwise" in m for m in messages) == 1
    assert sum("'1.weight', '1.bias'; they are updated by the fallback, SGD" in m for m in messages) == 1
    assert losses[-1] < losses[0]


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


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("curvature", ["pch-abs", "kflr", "fisher-empirical"])
def test_an_empty_micro_batch_adds_nothing(curvature, reduction):
    updated = []
    for parts in ([slice(0, 8)], [slice(0, 8), slice(0, 0)]):
        model, criterion, (x, y) = network(), nn.CrossEntropyLoss(reduction=reduction), batch()
        optimizer = so.EACG(model, criterion, 0.1, curvature=curvature)
        for part in parts:
            criterion(model(x[part]), y[part]).backward()
        optimizer.step()
        updated.append(model)
    for p, q in zip(*(model.parameters() for model in updated), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("make", EVERY_OPTIMIZER)
def test_a_layer_of_no_outputs(make):
    x, y = batch()
    model = nn.Sequential(nn.Linear(WIDTHS[0], 0), nn.Tanh(), nn.Linear(0, WIDTHS[-1])).double()
    before = model[2].bias.detach().clone()
    stepper(model, make, x, y)()
    assert not torch.equal(model[2].bias, before)


@pytest.mark.parametrize("curvature", ["pch-abs", "kflr", "fisher-mc", "fisher-empirical"])
def test_backward_for_some_parameters_alone(curvature):
    model, criterion, (x, y) = network(), nn.CrossEntropyLoss(), batch()
    optimizer = so.EACG(model, criterion, 0.1, curvature=curvature)
    before = copy.deepcopy(model)
    criterion(model(x), y).backward(inputs=[model[4].weight, model[4].bias])
    optimizer.step()
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[4].weight, before[4].weight)


@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum")])
def test_an_empty_batch_may_be_evaluated(criterion):
    model, (x, y) = network(), batch()
    for curvature in ("pch-abs", "kflr"):
        so.EACG(model, criterion, 0.1, curvature=curvature)
        output = model(x[:0])
        criterion(output, y[:0] if isinstance(criterion, nn.CrossEntropyLoss) else torch.zeros_like(output)).backward()


@pytest.mark.parametrize("solver", ["ea-cg", "kron-cg"])
def test_conjugate_gradients_have_no_factorisation_to_keep(solver):
    """With the biases in a group of their own the step is not the fused one, and must not use an old bias Hessian."""
    criterion, models = nn.CrossEntropyLoss(), [network(), network()]
    optimizers = [
        so.EACG(m, criterion, lr=0.1, solver=solver, inverse_every=every) for m, every in zip(models, (1, 5), strict=True)
    ]
    for optimizer, model in zip(optimizers, models, strict=True):
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
        optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p.dim() == 2]
        optimizer.add_param_group({"params": biases, "lr": 0.05})
        for seed in range(9):
            one_step(model, criterion, optimizer, *batch(seed=seed))
    assert_same(models[0].state_dict(), models[1].state_dict())


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


@pytest.mark.parametrize("solver", ["ea-cg", "kfi"])
def test_a_bias_of_two_layers_moves_once(solver):
    model, criterion, (x, y) = network(), nn.CrossEntropyLoss(), batch()
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[2].bias = model[0].bias
    optimizer = so.EACG(model, criterion, lr=0.1, momentum=0.0, solver=solver, max_step=None)
    before = model[0].bias.detach().clone()
    one_step(model, criterion, optimizer, x, y)
    # One of the two layers' directions, rather than their sum.
    h, alpha = (optimizer.state[model[i].weight]["factors"]["bias_hessian"] for i in (0, 2)), 0.01
    scale = 1.0 if solver == "kfi" else 1 - alpha
    own = [before - 0.1 * torch.linalg.solve(scale * each + alpha * torch.eye(4), model[0].bias.grad) for each in h]
    moved = model[0].bias.detach()
    assert any(torch.allclose(moved, each, rtol=1e-3) for each in own)


def test_a_subclass_of_the_solver_solves_by_itself():
    class Half(EACGSolver):
        def solve(self, prepared, grad_weight, grad_bias):
            p, d = super().solve(prepared, grad_weight, grad_bias)
            return 0.5 * p, None if d is None else 0.5 * d

    criterion, (x, y) = nn.CrossEntropyLoss(), batch()
    moves = []
    for solver in (EACGSolver(500, 1e-13), Half(500, 1e-13)):
        model = network()
        before = model[0].weight.detach().clone()
        one_step(model, criterion, so.EACG(model, criterion, lr=0.1, momentum=0.0, solver=solver, max_step=None), x, y)
        moves.append(model[0].weight.detach() - before)
    torch.testing.assert_close(moves[1], 0.5 * moves[0])


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


def moved(model, before, layer):
    """[dW, db] of a step."""
    new, old = model[layer], before[layer]
    changes = [new.weight - old.weight] + ([] if new.bias is None else [(new.bias - old.bias)[:, None]])
    return torch.cat(changes, 1).detach()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("solver", ["ea-cg", "ea-cg-truncated", "kfi", "ea-isotropic"])
def test_max_step_bounds_the_rows_and_leaves_steps_within_it_to_the_bit(solver, bias):
    criterion, (x, y), lr = nn.CrossEntropyLoss(), batch(), 0.1
    steps = {}
    free = network(bias)
    for max_step in (None, 1e9, "between", 1e-3):
        model = network(bias)
        if max_step == "between":  # binds at some layers alone
            lengths = {i: rows / len(free[i].weight) ** 0.5 for i, rows in steps[None][1].items()}
            max_step = sorted(lengths.values())[1] * 1.001
        optimizer = so.EACG(model, criterion, lr=lr, solver=solver, momentum=0.0, max_step=max_step)
        before = copy.deepcopy(model)
        one_step(model, criterion, optimizer, x, y)
        moves = {i: moved(model, before, i) / lr for i in (0, 2, 4)}
        steps[max_step] = moves, {i: float(m.norm()) for i, m in moves.items()}
        if max_step is None:
            free = model
            continue
        bound = 0
        for i, move in moves.items():
            length = steps[None][1][i]
            if length <= max_step * len(move) ** 0.5:
                assert torch.equal(model[i].weight, free[i].weight)
                assert bias is False or torch.equal(model[i].bias, free[i].bias)
            else:
                bound += 1
                torch.testing.assert_close(
                    move, steps[None][0][i] * (max_step * len(move) ** 0.5 / length), rtol=1e-6, atol=1e-12
                )
        assert bound == {1e9: 0, 1e-3: 3}.get(max_step, 1)


def test_max_step_is_the_weights_groups_and_read_at_every_step():
    model, criterion, (x, y) = network(), nn.CrossEntropyLoss(), batch()
    optimizer = so.EACG(model, criterion, lr=0.1, momentum=0.0, max_step=None)
    last = list(model[4].parameters())
    optimizer.param_groups[0]["params"] = [p for p in model.parameters() if all(p is not q for q in last)]
    optimizer.add_param_group({"params": last, "max_step": 1e-3})
    for expected in (1e-3, 1e-4):
        optimizer.param_groups[1]["max_step"] = expected
        before = copy.deepcopy(model)
        one_step(model, criterion, optimizer, x, y)
        assert moved(model, before, 0).norm() > 0.01
        torch.testing.assert_close(moved(model, before, 4).norm().item(), 0.1 * expected * 3**0.5)
    del optimizer.param_groups[1]["max_step"]  # as in a checkpoint of before there was a bound
    before = copy.deepcopy(model)
    one_step(model, criterion, optimizer, x, y)
    assert moved(model, before, 4).norm() > 0.001


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss])
def test_the_defaults_train_whatever_the_inputs(activation, reduction, loss):
    """Without a bound more than half of these diverge."""
    for mean, scale in ((0, 0.01), (0, 1), (0, 100), (5, 0.01), (5, 1), (5, 100)):
        torch.manual_seed(0)
        classes = torch.randint(4, (256,))
        x = (torch.randn(4, 8)[classes] + 0.5 * torch.randn(256, 8) + mean) * scale
        y = classes if loss is nn.CrossEntropyLoss else F.one_hot(classes).float()
        model = nn.Sequential(nn.Linear(8, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 4))
        criterion, measure = loss(reduction=reduction), loss()
        optimizer = so.EACG(model, criterion)
        first = measure(model(x), y).item()
        for step in range(60):
            rows = torch.arange(64) + 64 * (step % 4)
            one_step(model, criterion, optimizer, x[rows], y[rows])
        assert measure(model(x), y).item() < (0.999 if scale < 1 else 0.9) * first, (mean, scale)


def test_a_layer_whose_weight_is_frozen_is_named_as_the_reason():
    model, criterion = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), nn.CrossEntropyLoss()
    model[0].weight.requires_grad_(False)
    optimizer = so.EACG(model, criterion)
    criterion(model(torch.randn(8, 4)), torch.arange(8) % 3).backward()
    with pytest.warns(UserWarning, match=r"'0.bias' \(the weight of layer '0' is frozen\)"):
        optimizer.step()
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="weights of its nn.Linear layers are frozen.*EigenAdam trains any model"):
        so.EACG(model, criterion)
