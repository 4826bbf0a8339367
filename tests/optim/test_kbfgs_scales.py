"""KBFGS and KBFGSL on any scale of the loss, bounds on their steps, and rows that count by their targets' weights."""

import pytest
import torch
from helpers.kbfgs import autoencoder, closure_of
from torch import nn

import secondorder as so


def test_a_step_that_raises_the_loss_is_halved():
    model = autoencoder()
    optimizer = so.KBFGS(model, nn.MSELoss(), lr=1e3)
    x = torch.randn(64, 7, dtype=torch.float64)
    closure = closure_of(optimizer, model, nn.MSELoss(), x, x)
    for _ in range(5):
        before = optimizer.step(closure)
        assert closure().item() <= 1.05 * before.item()
    assert all(counts["halvings"] > 0 for counts in optimizer.diagnostics().values())


def test_a_hopeless_step_is_given_up():
    model = autoencoder()
    optimizer = so.KBFGS(model, nn.MSELoss(), lr=1e12)
    x = torch.randn(64, 7, dtype=torch.float64)
    before, calls = [p.clone() for p in model.parameters()], []
    closure = closure_of(optimizer, model, nn.MSELoss(), x, x)
    optimizer.step(lambda: (calls.append(1), closure())[1])
    assert len(calls) == 1 + 11  # where it starts; the whole step and ten halves
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(c["rejected"] == 1 and c["updated"] == c["skipped"] == 0 for c in optimizer.diagnostics().values())
    optimizer.param_groups[0]["lr"] = 0.3
    optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x))
    assert not torch.equal(model[0].weight, before[0])


def losses_of(cls, factor, steps=25, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    x, y = torch.randn(80, 6, dtype=dtype), torch.arange(80) % 3
    criterion = nn.CrossEntropyLoss()
    optimizer = cls(model, criterion, **options)

    def closure():
        optimizer.zero_grad()
        loss = factor * criterion(model(x), y)
        loss.backward()
        return loss

    return [optimizer.step(closure).item() / factor for _ in range(steps)]


@pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL])
@pytest.mark.parametrize("factor", [1e-6, 1e6, 1e-20, 1e20])
def test_training_does_not_depend_on_the_scale_of_the_loss(factor, cls):
    assert losses_of(cls, factor) == pytest.approx(losses_of(cls, 1.0), rel=1e-5)
    single = losses_of(cls, factor, dtype=torch.float32)
    assert single[-1] == pytest.approx(losses_of(cls, 1.0)[-1], rel=0.05)


def test_a_mean_loss_of_few_outputs_is_trained_faster_than_in_the_papers_units():
    assert losses_of(so.KBFGS, 1.0, 40)[-1] < 0.9 * losses_of(so.KBFGS, 1.0, 40, scale=None, max_step=None)[-1]


def test_the_scale_is_the_mean_curvature_of_the_pairs():
    """A quadratic loss z.D z / 2 of one layer's outputs has y = D s, on which c is bounded by D's eigenvalues."""
    torch.manual_seed(0)
    model, d = nn.Sequential(nn.Linear(4, 3)).double(), torch.tensor([2.0, 2.0, 2.0]).double()
    optimizer = so.KBFGS(model, lambda z, _: (z * d * z).mean(0).sum() / 2)
    x = torch.randn(30, 4).double()
    for _ in range(6):
        optimizer.step(closure_of(optimizer, model, optimizer.criterion, x, x))
    assert optimizer.state[model[0].weight]["scale"] == pytest.approx(2.0)


@pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL])
def test_steps_are_no_longer_than_max_step(cls):
    model = autoencoder()
    optimizer = cls(model, nn.MSELoss(), lr=1.0, max_step=0.01)
    x = torch.randn(40, 7, dtype=torch.float64)
    for _ in range(8):
        before = [p.clone() for p in model.parameters()]
        optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x))
        moved = [(p - q).square().sum(-1) for p, q in zip(model.parameters(), before, strict=True)]
        for rows, biases in zip(moved[::2], [model[i].bias.numel() for i in (0, 2, 3, 5)], strict=True):
            assert rows.sum().sqrt() <= 0.01 * biases**0.5 * (1 + 1e-9)


@pytest.mark.parametrize("options", [{"scale": "loss"}, {"max_step": 0.0}], ids=str)
def test_scales_and_bounds_that_are_none(options):
    with pytest.raises(ValueError, match=f"expected {next(iter(options))}"):
        so.KBFGS(autoencoder(), nn.MSELoss(), **options)


@pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL])
@pytest.mark.parametrize("function", [False, True])
def test_rows_of_ignored_targets_do_not_count(function, cls):
    """As without them, for layers whose rows are the targets'."""
    models = []
    for whole in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        criterion = torch.nn.functional.cross_entropy if function else nn.CrossEntropyLoss()
        optimizer = cls(model, criterion)
        x, y = torch.randn(40, 5).double(), torch.arange(40) % 3
        y[7:30] = -100
        x[7:30] += 3
        kept = slice(None) if whole else y != -100
        closure = closure_of(optimizer, model, optimizer.criterion, x[kept], y[kept])
        for _ in range(6):
            optimizer.step(closure)
        models.append(model)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL])
def test_weights_in_micro_batches_of_a_closure_are_those_of_their_union(cls, reduction):
    models = []
    for parts in (1, 3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 5.0]).double(), reduction=reduction)
        optimizer = cls(model, criterion)
        x, y = torch.randn(45, 5).double(), torch.arange(45) % 3
        y[[4, 5, 19, 20, 34, 35]] = -100  # every part has the same weights together, so that its mean is that of the union
        x[y == -100] += 3

        def closure(optimizer=optimizer, model=model, criterion=criterion, x=x, y=y, parts=parts):
            optimizer.zero_grad()
            with torch.no_grad():
                criterion(model(x[:7]), y[:7])  # for a log
            total = 0.0
            for own_x, own_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
                loss = criterion(model(own_x), own_y) / (parts if reduction == "mean" else 1)
                loss.backward()
                total += loss.detach()
            return total

        for _ in range(5):
            optimizer.step(closure)
        models.append(model)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q)
