"""Weights of classes and of rows: in every average as in the loss, against batches whose rows are repeated."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secondorder as so

CURVATURES = ["pch-abs", "gauss-newton", "kflr", "fisher-empirical"]
WEIGHT = torch.tensor([1.0, 2.0, 5.0]).double()
POSITIVE = torch.tensor([3.0]).double()
# criterion -> with weights, without, and every row's whole number of repetitions by which both are the same, from its label.
WEIGHTED = {
    "classes": (lambda y, **o: nn.CrossEntropyLoss(WEIGHT, **o), nn.CrossEntropyLoss, lambda y: WEIGHT[y]),
    "ignored": (
        lambda y, **o: nn.CrossEntropyLoss(WEIGHT, ignore_index=1, **o), nn.CrossEntropyLoss, lambda y: WEIGHT[y] * (y != 1)
    ),
    "positive": (
        lambda y, **o: nn.BCEWithLogitsLoss(pos_weight=POSITIVE, **o), nn.BCEWithLogitsLoss, lambda y: 1 + 2.0 * (y > 0)
    ),
    "rows": (
        lambda y, **o: nn.BCEWithLogitsLoss(weight=y[:, None] + 1.0, **o), nn.BCEWithLogitsLoss, lambda y: y + 1.0
    ),
    "probabilities": (
        lambda y, **o: nn.CrossEntropyLoss(WEIGHT, **o), nn.CrossEntropyLoss, lambda y: WEIGHT[y]
    ),
    "function": (lambda y, **o: F.mse_loss, lambda **o: F.mse_loss, lambda y: y + 1.0),
}  # fmt: skip


def weighted_case(kind, repeated, reduction):
    """A net, a criterion, inputs and targets: with weights, or with rows that are repeated so many times."""
    torch.manual_seed(0)
    label = torch.arange(30) % 3
    x = torch.randn(30, 4).double() + label[:, None]
    make, plain, repetitions = WEIGHTED[kind]
    if kind in ("positive", "rows"):
        y = (label > 0).double()[:, None]
    else:
        y = F.one_hot(label, 3).double() if kind in ("probabilities", "function") else label
    model = nn.Sequential(
        nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 5), nn.ELU(), nn.Linear(5, y.shape[1] if y.dim() > 1 else 3)
    )
    if not repeated:
        return model.double(), make(label, reduction=reduction), x, y
    times = repetitions(label).long()
    return model.double(), plain(reduction=reduction), x.repeat_interleave(times, 0), y.repeat_interleave(times, 0)


METHODS = {
    **{f"{c}-{s}": lambda m, c_, c=c, s=s: so.EACG(m, c_, 0.05, curvature=c, solver=s)
       for c, s in (("pch-abs", "kfi"), ("gauss-newton", "ea-isotropic"), ("kflr", "exact"), ("fisher-empirical", "kfi"),
                    ("pch-clip", "ea-cg"))},
    **{name: lambda m, c_, name=name: getattr(so, name)(m, c_) for name in ("KFRA", "KFLR", "KBFGS", "KBFGSL")},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "reduction"), [
    ("classes", "mean"), ("classes", "sum"), ("ignored", "mean"), ("positive", "sum"), ("rows", "sum"), ("probabilities", "sum"),
])  # fmt: skip
def test_rows_with_a_weight_count_as_if_they_were_repeated(kind, reduction, method):
    """Steps with whole numbers as weights of classes, or of rows, against a batch whose rows are repeated so often."""
    moved = []
    for repeated in (False, True):
        model, criterion, x, y = weighted_case(kind, repeated, reduction)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        optimizer = METHODS[method](model, criterion)

        def closure(optimizer=optimizer, model=model, criterion=criterion, x=x, y=y):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - before)
    assert (moved[0] - moved[1]).norm() < 1e-6 * moved[1].norm()


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_function_with_weights_of_rows(curvature):
    factors = []
    for repeated in (False, True):
        model, _, x, y = weighted_case("function", repeated, "mean")
        if not repeated:
            weight = (torch.arange(30) % 3 + 1.0).double()[:, None].expand(30, 3)
        optimizer = so.EACG(model, F.mse_loss, curvature=curvature, solver="kfi")
        optimizer.criterion(model(x), y, **({} if repeated else {"weight": weight})).backward()
        optimizer.step()
        factors.append([t for p in model.parameters() if p.dim() == 2 for t in optimizer.state[p]["factors"].values()])
    torch.testing.assert_close(*factors)


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("curvature", ["gauss-newton", "kflr", "fisher-empirical"])
def test_some_rows_stand_for_those_that_count_by_their_weights(curvature, weight):
    """With `curvature_samples` factors are those of evenly spaced rows among the ones that count."""
    found = []
    for some in (True, False):
        torch.manual_seed(0)
        model, criterion = nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 3)).double(), nn.CrossEntropyLoss(weight)
        x, y = torch.randn(40, 4).double(), torch.arange(40) % 3
        y[3:17] = -100
        x[3:17] += 2
        kept = (y != -100).nonzero().flatten()
        rows = torch.arange(40) if some else kept[torch.arange(8) * len(kept) // 8]
        optimizer = so.EACG(model, criterion, curvature=curvature, solver="kfi", curvature_samples=8)
        criterion(model(x[rows]), y[rows]).backward()
        w = model[2].weight.detach().clone()
        optimizer.step()
        own = [optimizer.state[model[i].weight]["factors"] for i in (0, 2)]
        first, last = (each["bias_hessian"] for each in own)
        # The recursion starts from all rows: what is left is E[d1 d1^T].
        hessians = (first / (w.T @ last @ w),) if curvature == "gauss-newton" else (first, last)
        found.append([*hessians, *(each["input_second_moment"] for each in own)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("ignored", [-100, 1])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_weights_of_micro_batches_are_those_of_their_union(curvature, weight, ignored):
    """Also where all targets of one are ignored."""
    factors = []
    for parts in (1, 3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 3)).double()
        criterion = nn.CrossEntropyLoss(weight, reduction="sum", ignore_index=ignored)
        x, y = torch.randn(30, 4).double(), (torch.arange(30) % 3).sort().values  # a part of one class each
        optimizer = so.EACG(model, criterion, curvature=curvature, solver="kfi")
        for own_x, own_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            criterion(model(own_x), own_y).backward()
        optimizer.step()
        factors.append([t for i in (0, 2) for t in optimizer.state[model[i].weight]["factors"].values()])
    torch.testing.assert_close(*factors)
