"""The recorded loss at other parameters: its value, its rows that stand for all, and its quadratic form."""

import copy
import math
import random

import pytest
import torch
from helpers.losses import CE, Normed, X, Y, net
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import secondorder as so
from secondorder._layers import linear_layers
from secondorder._tape import Tape, TapeOptions
from secondorder._tensors import Transfer
from secondorder.stepping import LocalLoss, recorded_loss
from secondorder.stepping.recorded_loss import ChainLoss, ReplayedLoss

pytestmark = pytest.mark.filterwarnings("ignore:secondorder")


class Wrapped(nn.Module):
    """A net with something before and after it."""

    def __init__(self, body, after=lambda z: z):
        super().__init__()
        self.body, self.after = body, after

    def forward(self, *args):
        return self.after(self.body(*args))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(5, 12), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)).mean(1))


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.utils.parametrizations.spectral_norm(nn.Conv1d(1, 3, 2))
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x[:, None])).flatten(1))


class Stateful(nn.Module):
    """A hidden state kept in an attribute, and a counter."""

    def __init__(self):
        super().__init__()
        self.inner, self.back, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.hidden, self.calls = torch.linspace(-1, 1, 144).double().view(24, 6), 0

    def forward(self, x):
        hidden = torch.tanh(self.inner(x) + self.back(self.hidden))
        self.hidden, self.calls = hidden.detach(), self.calls + 1
        return self.head(hidden)


class Differentiating(nn.Module):
    """A net and its derivatives by its input, as of an energy with its forces, or of an equation's solution."""

    def __init__(self):
        super().__init__()
        self.net = net(5, 6, 1)

    def forward(self, x):
        x = x.clone().requires_grad_()
        energy = self.net(x)
        (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return torch.cat([energy, slope], 1)


class Learnt(nn.Module):
    """A net whose input is a parameter."""

    def __init__(self):
        super().__init__()
        self.input, self.net = nn.Parameter(torch.linspace(-1, 1, 120).double().view(24, 5)), net(5, 6, 3)

    def forward(self, x):
        return self.net(self.input)


def heads():
    return nn.ModuleList([net(5, 6, 6), *(nn.Sequential(nn.Tanh(), nn.Linear(6, 3)).double() for _ in range(2))])


def under_two_names():
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(5, 3))


class Skipping(nn.Module):
    """Layers left out at random, by torch's or Python's generator."""

    def __init__(self, draw):
        super().__init__()
        self.stem, self.head, self.draw = nn.Linear(5, 6), nn.Linear(6, 3), draw
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(6)])

    def forward(self, x):
        h = self.stem(x)
        for block in self.blocks:
            if float(self.draw()) > 0.4:
                h = h + torch.tanh(block(h))
        return self.head(h)


def flat_nce(z, _=None):
    """InfoNCE over the pairs (i, i + n)."""
    z = F.normalize(z, dim=1)
    n = len(z) // 2
    similarity = (z @ z.T / 0.5).masked_fill(torch.eye(2 * n, dtype=torch.bool), -1e9)
    return F.cross_entropy(similarity, torch.cat([torch.arange(n) + n, torch.arange(n)]))


SEQUENCES = torch.randn(24, 4, 5, generator=torch.Generator().manual_seed(1)).double()
LABELS = torch.arange(96).view(24, 4) % 3


def PLAIN():  # a net like the classes
    return net(5, 6, 3)


def between(layer):
    return nn.Sequential(nn.Linear(5, 6), layer, nn.Linear(6, 3))


def flat(z):
    return z.flatten(0, 1)


# (model, criterion, loss of model and criterion, kind of piece, whether some of the rows stand for all)
USES = {
    "squeeze": (lambda: net(5, 6, 1), nn.MSELoss(), lambda m, c: c(m(X).squeeze(-1), X.sum(1)), ChainLoss, True),
    "squeeze, no chain": (lambda: Normed(1), nn.MSELoss(), lambda m, c: c(m(X).squeeze(-1), X.sum(1)), ReplayedLoss, True),
    "dictionary": (lambda: Wrapped(Normed(), lambda z: {"z": z}), CE, lambda m, c: c(m(X)["z"], Y), ReplayedLoss, True),
    "tuple": (lambda: Wrapped(Normed(), lambda z: (1, z)), CE, lambda m, c: c(m(X)[1], Y), ReplayedLoss, True),
    "log of a sum": (PLAIN, nn.NLLLoss(), lambda m, c: c(torch.log(m(X).softmax(1) + 1e-3), Y), ChainLoss, None),
    "gather": (PLAIN, nn.SmoothL1Loss(), lambda m, c: c(m(X).gather(1, Y[:, None]).squeeze(1), X.sum(1)), ChainLoss, False),
    "gather, no chain": (Normed, nn.MSELoss(), lambda m, c: c(m(X).gather(1, Y[:, None]), X[:, :1]), ReplayedLoss, False),
    "scaled and shifted": (Normed, nn.MSELoss(), lambda m, c: c(2 * m(X)[:, 1:] / 3 - 1, X[:, :2]), ReplayedLoss, False),
    "view": (lambda: net(5, 6, 3), CE, lambda m, c: c(m(SEQUENCES).view(-1, 3), LABELS.view(-1)), ChainLoss, True),
    "model.forward": (lambda: net(5, 6, 3), CE, lambda m, c: c(m.forward(X), Y), ChainLoss, True),
    "flattens itself": (lambda: Wrapped(PLAIN(), flat), CE, lambda m, c: c(m(SEQUENCES), LABELS.view(-1)), ChainLoss, True),
    "flattens itself, no chain": (
        lambda: Wrapped(Normed(), flat), CE, lambda m, c: c(m(SEQUENCES), LABELS.view(-1)), ReplayedLoss, False,
    ),
    "classes second": (
        lambda: Wrapped(net(5, 6, 3), lambda z: z.transpose(1, 2)), CE, lambda m, c: c(m(SEQUENCES), LABELS), ChainLoss, False,
    ),
    "log_softmax": (lambda: nn.Sequential(*PLAIN(), nn.LogSoftmax(1)), nn.NLLLoss(), lambda m, c: c(m(X), Y), ChainLoss, False),
    "log_softmax, no chain": (Normed, nn.NLLLoss(), lambda m, c: c(F.log_softmax(m(X), 1), Y), ReplayedLoss, False),
    "sigmoid": (
        lambda: Normed(1), nn.BCELoss(), lambda m, c: c(torch.sigmoid(m(X).squeeze(-1)), (Y > 0).double()), ReplayedLoss, False,
    ),
    "a layer under two names": (under_two_names, CE, lambda m, c: c(m(X), Y), ReplayedLoss, True),
    "two calls": (Normed, CE, lambda m, c: c(m(X), Y) + 0.5 * c(m(X.flip(0)), Y), ReplayedLoss, True),
    "two nets": (
        lambda: nn.ModuleList([net(5, 6, 1), net(5, 4, 1)]), nn.MSELoss(),
        lambda m, c: c(m[0](X).squeeze(1), X.sum(1)) + c(m[1](X).squeeze(1), X.sum(1)), ChainLoss, True,
    ),
    "two heads": (heads, CE, lambda m, c: c(m[1](h := m[0](X)), Y) + 0.5 * c(m[2](h), Y.flip(0)), ChainLoss, True),
    "target first": (lambda: net(5, 6, 1), nn.MSELoss(), lambda m, c: c(X.sum(1), m(X).squeeze(-1)), ChainLoss, True),
    "derivatives within": (Differentiating, nn.MSELoss(), lambda m, c: c(m(X), X.repeat(1, 2)[:, :6]), ReplayedLoss, True),
    "a parameter as input": (Learnt, CE, lambda m, c: c(m(X), Y), ReplayedLoss, None),
    "a sum": (lambda: net(5, 6, 3), lambda z, y: (z - y).square().sum(), lambda m, c: c(m(X), X[:, :3]), ChainLoss, True),
    "InfoNCE": (lambda: net(5, 6, 4), flat_nce, lambda m, c: c(m(X)), ChainLoss, False),
    "time first": (lambda: net(5, 6, 1), nn.MSELoss(), lambda m, c: c(m(SEQUENCES), SEQUENCES[..., :1]), ChainLoss, True),
    "recurrent": (Recurrent, CE, lambda m, c: c(m(SEQUENCES), Y), ReplayedLoss, True),
    "attention": (Attention, CE, lambda m, c: c(m(SEQUENCES), Y), ReplayedLoss, True),
    "spectral norm": (Spectral, CE, lambda m, c: c(m(X), Y), ReplayedLoss, True),
    "hidden state": (Stateful, CE, lambda m, c: c(m(X), Y), ReplayedLoss, False),
    "dropout": (lambda: between(nn.Dropout(0.5)), CE, lambda m, c: c(m(X), Y), ReplayedLoss, False),
    "batch norm": (lambda: between(nn.BatchNorm1d(6)), CE, lambda m, c: c(m(X), Y), ReplayedLoss, False),
    "skipped by torch": (lambda: Skipping(lambda: torch.rand(())), CE, lambda m, c: c(m(X), Y), ReplayedLoss, None),
    "skipped by Python": (lambda: Skipping(random.random), CE, lambda m, c: c(m(X), Y), ReplayedLoss, None),
}  # fmt: skip


def recorded(use, fraction, offset=0):
    """A LocalLoss of a use's loss, its model, and a function that gives the loss at other parameters, from the same state."""
    make, criterion, loss_of, _, _ = USES[use]
    torch.manual_seed(0)
    random.seed(0)
    model = make().double()
    criterion = criterion if isinstance(criterion, nn.Module) else so.criteria.FunctionCriterion(criterion)
    fresh = copy.deepcopy(model)
    tape = Tape(linear_layers(model), criterion, TapeOptions(keep_inputs=True), model)
    states = torch.get_rng_state(), random.getstate()
    loss = loss_of(model, criterion)

    def at(values):
        own = copy.deepcopy(fresh)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        names = [name for name, _ in model.named_parameters()]
        return functional_call(
            _Loss(own, lambda m: loss_of(m, criterion)), {f"m.{n}": v for n, v in zip(names, values, strict=True)}
        )

    with tape.muted():
        assert at([p.detach() for p in model.parameters()]).item() == pytest.approx(loss.item(), rel=1e-12)
    loss.backward()
    assert tape.outside is None
    here = [p for p in model.parameters() if p.grad is not None]
    local = LocalLoss(model, criterion, tape.losses, here, fraction, offset, tape)
    return local, model, at, tape


class _Loss(nn.Module):
    """functional_call calls the loss, not the model: the calls before and after the model are part of it."""

    def __init__(self, m, loss):
        super().__init__()
        self.m, self.loss = m, loss

    def forward(self):
        return self.loss(self.m)


@pytest.mark.parametrize("use", USES)
def test_the_loss_that_backward_was_called_on_at_other_parameters(use):
    local, model, at, tape = recorded(use, 1.0)
    assert [type(piece) for piece in local.pieces] == [USES[use][3]] * len(local.pieces)
    assert local.faithful
    gradients = {p: p.grad.clone() for p in local.parameters}
    torch.manual_seed(3)
    moved = {p: (p + 0.1 * torch.randn_like(p)).detach() for p in local.parameters}
    generators, attributes = (torch.get_rng_state(), random.getstate()), [dict(vars(m)) for m in model.modules()]
    own = [dict(m._parameters) for m in model.modules()]
    buffers = [b.clone() for b in model.buffers()]
    value, start = local.value(list(moved.values())), local.start
    first, form = local.products([list(gradients.values())], Transfer())()
    # Nothing is left of the evaluations.
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    for before, module in zip(attributes, model.modules(), strict=True):
        assert all(vars(module)[key] is value for key, value in before.items())
    for before, module in zip(own, model.modules(), strict=True):
        assert all(module._parameters[key] is p for key, p in before.items())
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    with tape.muted():
        here = [p.detach() for p in model.parameters()]
        assert start == pytest.approx(at(here).item(), rel=1e-9)
        assert value == pytest.approx(at([moved.get(p, p.detach()) for p in model.parameters()]).item(), rel=1e-9)
    # The slope along the gradient is its square: nothing of the loss is missing.
    assert float(first[0]) == pytest.approx(sum(float(g.square().sum()) for g in gradients.values()), rel=1e-9)
    assert float(form) > 0


@pytest.mark.parametrize("use", [use for use in USES if USES[use][4] is not None])
def test_rows_stand_for_the_batch_only_where_they_are_instances(use, monkeypatch):
    monkeypatch.setattr(recorded_loss, "LEAST_INSTANCES", 1)
    monkeypatch.setattr(recorded_loss, "LEAST_OUTPUTS", 1)
    locals_ = [recorded(use, 0.25, offset)[0] for offset in range(4)]
    assert {piece.rows is not None for local in locals_ for piece in local.pieces} == {USES[use][4]}
    whole = recorded(use, 1.0)[0]
    vector = [[torch.ones_like(p) for p in whole.parameters]]
    # The four subsamples make up the batch.
    assert sum(local.start for local in locals_) / 4 == pytest.approx(whole.start, rel=1e-9)
    first = sum(local.products([[torch.ones_like(p) for p in local.parameters]], Transfer())()[0] for local in locals_) / 4
    torch.testing.assert_close(first, whole.products(vector, Transfer())()[0])


@pytest.mark.parametrize("use", ["log_softmax", "log_softmax, no chain", "classes second", "recurrent", "attention"])
def test_the_form_is_that_of_the_logits(use):
    """v^T G v by forward differences of the logits and cross-entropy's Hessian at each of them."""
    local, model, _, tape = recorded(use, 1.0)
    torch.manual_seed(4)
    vector = [torch.randn_like(p) for p in local.parameters]
    _, form = local.products([vector], Transfer())()
    x = SEQUENCES if use in ("classes second", "recurrent", "attention") else X
    y = LABELS.reshape(-1) if use == "classes second" else Y
    names = [name for name, _ in model.named_parameters()]

    def logits(step):
        values = {n: p.detach() + step * v for n, p, v in zip(names, local.parameters, vector, strict=True)}
        with tape.muted(), torch.no_grad():
            z = functional_call(model, values, (x,))
        return (z.transpose(1, 2) if use == "classes second" else z).reshape(-1, 3)  # log-probabilities do as well

    tangent, p = (logits(1e-6) - logits(-1e-6)) / 2e-6, logits(0.0).softmax(1)
    expected = ((p * tangent**2).sum(1) - (p * tangent).sum(1) ** 2).sum() / len(y)
    assert float(form) == pytest.approx(float(expected), rel=1e-6)


def convex(z, y):
    """Log-cosh, which no formula knows."""
    return (z - y).cosh().log().mean()


def test_a_convex_function_has_every_instances_own_hessian():
    model = net(5, 6, 3)
    criterion = so.criteria.FunctionCriterion(convex)
    tape = Tape(linear_layers(model), criterion, TapeOptions(keep_inputs=True), model)
    criterion(model(X), 2 * X[:, :3]).backward()
    local = LocalLoss(model, criterion, tape.losses, list(model.parameters()), 1.0, 0, tape)
    vector = [torch.randn_like(p) for p in model.parameters()]
    _, form = local.products([vector], Transfer())()
    tape.remove()
    names = [n for n, _ in model.named_parameters()]
    _, tangent = torch.func.jvp(
        lambda *p: functional_call(model, dict(zip(names, p, strict=True)), (X,)), tuple(model.parameters()), tuple(vector)
    )
    curvature = 1 / (model(X).detach() - 2 * X[:, :3]).cosh() ** 2 / 72
    assert float(form) == pytest.approx(float((curvature * tangent.detach() ** 2).sum()), rel=1e-9)


@pytest.mark.parametrize("criterion", [nn.MSELoss(), so.criteria.FunctionCriterion(convex)], ids=["mse", "log-cosh"])
@pytest.mark.parametrize("chain", [True, False])
@pytest.mark.parametrize("final", [nn.Sigmoid(), nn.Softmax(1)], ids=["sigmoid", "softmax"])
def test_a_criterion_that_is_convex_behind_a_final_function_has_its_form_there(final, chain, criterion):
    model = nn.Sequential(*([] if chain else [nn.Unflatten(1, (5,)), nn.LayerNorm(5).double()]), *net(5, 6, 3), final)
    target = 3 * X[:, :3]
    tape = Tape(linear_layers(model), criterion, TapeOptions(keep_inputs=True), model)
    criterion(model(X), target).backward()
    local = LocalLoss(model, criterion, tape.losses, list(model.parameters()), 1.0, 0, tape)
    assert isinstance(local.pieces[0], ChainLoss if chain else ReplayedLoss)
    vector = [torch.randn_like(p) for p in model.parameters()]
    _, form = local.products([vector], Transfer())()
    tape.remove()
    names = [n for n, _ in model.named_parameters()]
    u, tangent = torch.func.jvp(
        lambda *p: functional_call(model, dict(zip(names, p, strict=True)), (X,)), tuple(model.parameters()), tuple(vector)
    )
    _, product = torch.autograd.functional.hvp(lambda u: criterion(u, target), u.detach(), tangent.detach())
    assert float(form) == pytest.approx(float((product * tangent.detach()).sum()), rel=1e-9)


class Watchful(Normed):
    """Looks at what it computes."""

    def forward(self, x):
        z = super().forward(x)
        if not z.abs().max() < 1e100:
            raise ValueError("the outputs are too large")
        return z


@pytest.mark.parametrize("make", [PLAIN, Watchful])
def test_the_loss_at_parameters_that_are_not_finite_is_infinite(make):
    torch.manual_seed(0)
    model = make().double()
    tape = Tape(linear_layers(model), CE, TapeOptions(keep_inputs=True), model)
    CE(model(X), Y).backward()
    local = LocalLoss(model, CE, tape.losses, list(model.parameters()), 1.0, 0, tape)
    overflowing = [p + math.inf for p in local.here]
    assert local.value(overflowing) == math.inf
    if make is Watchful:  # an error at finite ones is the user's to see
        with pytest.raises(ValueError, match="too large"):
            local.value([1e300 * p for p in local.here])


def test_few_labelled_rows_are_those_that_count(monkeypatch):
    monkeypatch.setattr(recorded_loss, "LEAST_INSTANCES", 1)
    monkeypatch.setattr(recorded_loss, "LEAST_OUTPUTS", 1)
    torch.manual_seed(0)
    model, criterion = net(5, 6, 3), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]).double())
    y = torch.full((24,), -100)
    y[[1, 4, 7, 8, 13, 17, 20, 22]] = torch.arange(8) % 3
    tape = Tape(linear_layers(model), criterion, TapeOptions(keep_inputs=True), model)
    criterion(model(X), y).backward()
    here = list(model.parameters())
    for offset in range(4):
        local = LocalLoss(model, criterion, tape.losses, here, 0.25, offset, tape)
        assert local.instances == 8
        rows = (y != -100).nonzero().flatten()[offset::4]
        assert local.start == pytest.approx(criterion(model(X[rows]), y[rows]).item(), rel=1e-12)


def test_a_chain_under_autocast_is_its_record():
    torch.manual_seed(0)
    model = net(5, 6, 3).float()
    optimizer = so.LayerwiseNewton(model, CE)
    for whole in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=True):
            z = model(X.float())
            loss = CE(z, Y) if whole else None
        (CE(z.float(), Y) if loss is None else loss).backward()
        local = optimizer._loss({p: n for n, p in model.named_parameters()}, 0, Transfer())
        assert type(local.pieces[0]) is ChainLoss
        assert local.faithful
        optimizer.zero_grad()
