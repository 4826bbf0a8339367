"""EACG's steps against dense matrices, its arguments and groups, and its bound on the step."""

import copy
import io

import pytest
import torch
from helpers.training import CRITERIA, assert_same, batch, network, one_step
from oracles import eacg_matrix, pch_by_loops, textbook_cg
from torch import nn
from torch.nn import functional as F

import secondorder as so
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
