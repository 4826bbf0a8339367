"""What is evaluated again is what was recorded, with buffers, states and arguments by name; or a warning says that it is not."""

import warnings

import pytest
import torch
from helpers.curvatures import Doubled
from helpers.losses import CE, FAMILY, Normed, X, Y, net, penalty
from helpers.optimizers import parameters
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import secondorder as so
from secondorder._tensors import Transfer
from secondorder.stepping.recorded_loss import ChainLoss

pytestmark = pytest.mark.filterwarnings("ignore:secondorder")


def test_a_model_that_cannot_repeat_itself_is_told_of_once():
    torch.manual_seed(0)

    counts = iter(range(1000))

    class Counting(Normed):
        def forward(self, x):
            return super().forward(x) * (1 + 0.1 * (next(counts) % 3))  # a state that no module has

    model = Counting().double()
    optimizer = so.LayerwiseNewton(model, CE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            CE(model(X), Y).backward()
            optimizer.step()
    assert sum("gives something else when it is evaluated again" in str(w.message) for w in caught) == 1


class OwnNorm(nn.Module):
    """A batch norm that no module of torch's is."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, training=True)


@pytest.mark.parametrize("make_norm", [nn.BatchNorm1d, OwnNorm])
@pytest.mark.parametrize("make", FAMILY)
def test_running_statistics_are_those_of_the_batches_alone(make, make_norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), make_norm(6), nn.Tanh(), nn.Linear(6, 3)).double()
    optimizer = make(model, CE)
    mean, var = torch.zeros(6).double(), torch.ones(6).double()
    for step in range(4):
        x = X + 0.1 * step
        with torch.no_grad():
            z = model[0](x)
            mean, var = 0.9 * mean + 0.1 * z.mean(0), 0.9 * var + 0.1 * z.var(0)
        optimizer.zero_grad()
        CE(model(x), Y).backward()
        optimizer.step()
        torch.testing.assert_close(model[1].running_mean, mean)
        torch.testing.assert_close(model[1].running_var, var)


def perturbed(model, criterion, x=X):
    """The gradient at other weights, as of SAM; they are back before the step."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    criterion(model(x), Y).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.1)


def by_other_weights(model, criterion):
    criterion(functional_call(model, {n: p + 0.1 for n, p in model.named_parameters()}, (X,)), Y).backward()


class Scaled(nn.Module):
    """A criterion with a state."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()).double())

    def forward(self, z, y):
        loss = F.cross_entropy(z, y)
        with torch.no_grad():
            self.scale.mul_(0.9).add_(0.1 * loss.detach())
        return loss / self.scale


def plainly(model, criterion):
    criterion(model(X), Y).backward()


OTHERS = {
    "weights moved": (lambda: CE, perturbed),
    "functional_call": (lambda: CE, by_other_weights),
    "noise": (lambda: so.criteria.FunctionCriterion(lambda z, y: F.cross_entropy(z + torch.randn_like(z), y)), plainly),
    "state": (Scaled, plainly),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_chain_of_layers_is_compared_with_the_record(kind):
    torch.manual_seed(0)
    model, (criterion, call) = net(5, 6, 3), (OTHERS[kind][0](), OTHERS[kind][1])
    optimizer = so.LayerwiseNewton(model, criterion)
    call(model, criterion)
    with pytest.warns(UserWarning, match="gives something else when it is evaluated again"):
        local = optimizer._loss({p: n for n, p in model.named_parameters()}, 0, Transfer())
    assert type(local.pieces[0]) is ChainLoss


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("make", FAMILY)
def test_trials_leave_a_criterion_with_a_state_alone(make, with_closure):
    torch.manual_seed(0)
    model, criterion = net(5, 6, 3), Scaled()
    optimizer = make(model, criterion, curvature="pch-abs")
    scale = torch.ones(()).double()
    for _ in range(3):
        with torch.no_grad():
            scale = 0.9 * scale + 0.1 * F.cross_entropy(model(X), Y)

        def closure():
            optimizer.zero_grad()
            loss = criterion(model(X), Y)
            loss.backward()
            return loss

        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        torch.testing.assert_close(criterion.scale, scale)


def named_mse(z, goal):
    return F.mse_loss(z, F.one_hot(goal, 3).to(z))


@pytest.mark.parametrize("make", [so.EACG, *FAMILY])
def test_settings_of_a_function_by_position_are_those_by_name(make):
    found, weight = [], torch.tensor([1.0, 2.0, 5.0]).double()
    for by_name in (False, True):
        torch.manual_seed(0)
        model = net(5, 6, 3)
        optimizer = make(model, F.cross_entropy)
        for _ in range(2):
            optimizer.zero_grad()
            settings = {"weight": weight} if by_name else {}
            optimizer.criterion(model(X), Y, *([] if by_name else [weight]), **settings).backward()
            optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=0, atol=0)


CRITERIA_BY_NAME = {
    "module": (CE, "input", "target"),
    "class weights": (nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 5.0]).double()), "input", "target"),
    "function": (so.criteria.FunctionCriterion(F.cross_entropy), "input", "target"),
    "own": (so.criteria.FunctionCriterion(named_mse), "z", "goal"),
    "composite": (so.criteria.CompositeLoss(lambda z: 2 * z, CE), "output", "target"),
}


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("make", [so.EACG, *FAMILY])
@pytest.mark.parametrize("kind", CRITERIA_BY_NAME)
def test_arguments_by_name_are_those_by_position(kind, make, with_closure):
    criterion, output, target = CRITERIA_BY_NAME[kind]
    if make is so.KFAC and kind == "own":
        return  # no likelihood
    found = []
    for way in range(3):
        torch.manual_seed(0)
        model = net(5, 6, 3)
        optimizer = make(model, criterion)

        def closure(way=way, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            named = {output: model(X), target: Y}
            loss = criterion(*[named.pop(name) for name in (output, target)[:way]], **named)
            (loss + (penalty(model, 2) if with_closure and make is not so.EACG else 0)).backward()
            return loss

        for _ in range(2):
            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        found.append(parameters(model))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])


class Once(nn.Module):
    def forward(self, x):
        return Doubled.apply(x)


@pytest.mark.parametrize("function", [nn.EmbeddingBag(7, 5), nn.Hardsigmoid(), Once()], ids=repr)
@pytest.mark.parametrize("with_closure", [False, True])
def test_a_function_without_a_second_derivative_is_named_in_the_error(with_closure, function):
    torch.manual_seed(0)
    table = isinstance(function, nn.EmbeddingBag)
    first = [function] if table else [nn.Linear(5, 5), function]
    model = nn.Sequential(*first, nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.arange(48).reshape(24, 2) % 7 if table else X
    optimizer = so.LayerwiseNewton(model, CE)
    before = parameters(model)

    def closure():
        optimizer.zero_grad()
        loss = CE(model(x), Y) + (1e-3 * penalty(model, 2) if with_closure else 0)
        loss.backward()
        return loss

    if not with_closure:
        closure()
    words = "expected a loss that can be differentiated twice, but .*; take EACG or EigenAdam. No parameter and no state"
    with pytest.raises(RuntimeError, match=words):
        optimizer.step(closure if with_closure else None)
    assert torch.equal(parameters(model), before)


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_second_derivative_that_is_not_finite_is_skipped(with_closure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    target = model(X).detach()
    target[1:] += 1
    optimizer = so.LayerwiseNewton(
        model, lambda output, target: (output - target).norm(dim=1).mean(), curvature="fisher-empirical", nonfinite="skip"
    )
    before = parameters(model)

    def closure():
        optimizer.zero_grad()
        loss = optimizer.criterion(model(X), target) + (1e-3 * penalty(model, 2) if with_closure else 0)
        loss.backward()
        return loss

    if not with_closure:
        closure()
    optimizer.step(closure if with_closure else None)
    assert torch.equal(parameters(model), before)
    assert optimizer.skipped_steps == 1
