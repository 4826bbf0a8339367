"""What the quadratic model, its trials and its checks look at: whatever backward() was called on, or an error says so."""

import copy
import math
import random
import warnings

import pytest
import torch
from helpers.optimizers import parameters
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import secondorder as so
from secondorder._layers import linear_layers
from secondorder._tape import Tape
from secondorder._tensors import Transfer
from secondorder.stepping import LocalLoss, recorded_loss
from secondorder.stepping.recorded_loss import ChainLoss, ReplayedLoss

pytestmark = pytest.mark.filterwarnings("ignore:secondorder")


def net(*widths, activation=nn.Tanh):
    layers = []
    for n_in, n_out in zip(widths, widths[1:]):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers[:-1]).double()


class Wrapped(nn.Module):
    """A net with something before and after it."""

    def __init__(self, body, after=lambda z: z):
        super().__init__()
        self.body, self.after = body, after

    def forward(self, *args):
        return self.after(self.body(*args))


class Normed(nn.Module):
    """No chain of linear layers."""

    def __init__(self, n_out=3):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, n_out)

    def forward(self, x):
        return self.second(torch.tanh(self.norm(self.first(x))))


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


CE = nn.CrossEntropyLoss()
X, Y = torch.randn(24, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(24) % 3
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
    "two calls": (Normed, CE, lambda m, c: c(m(X), Y) + 0.5 * c(m(X.flip(0)), Y), ReplayedLoss, True),
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
    tape = Tape(linear_layers(model), criterion, diagonal=False, model=model, keep_inputs=True)
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
    here = {p: n for n, p in model.named_parameters() if p.grad is not None}
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
    buffers = [b.clone() for b in model.buffers()]
    value, start = local.value(list(moved.values())), local.start
    first, form = local.products([list(gradients.values())], Transfer())()
    # Nothing is left of the evaluations.
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    for before, module in zip(attributes, model.modules(), strict=True):
        assert all(vars(module)[key] is value for key, value in before.items())
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
    names = list(local.parameters.values())

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
    tape = Tape(linear_layers(model), criterion, diagonal=False, model=model, keep_inputs=True)
    criterion(model(X), 2 * X[:, :3]).backward()
    local = LocalLoss(model, criterion, tape.losses, {p: n for n, p in model.named_parameters()}, 1.0, 0, tape)
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
    tape = Tape(linear_layers(model), criterion, diagonal=False, model=model, keep_inputs=True)
    criterion(model(X), target).backward()
    local = LocalLoss(model, criterion, tape.losses, {p: n for n, p in model.named_parameters()}, 1.0, 0, tape)
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


# --- terms outside of the criterion -------------------------------------------------------------------------------------


def penalty(model, power):
    return 0.1 * sum(p.abs().pow(power).sum() for p in model.parameters())


class WithHidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        self.hidden = torch.tanh(self.first(x))
        return self.second(self.hidden)


def generator_step(m, c):
    torch.manual_seed(5)
    judge = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return c(judge(m(X)), torch.ones(24, 1).double())


def actor_critic(m, c):
    z = m(X)
    value, log_p = z[:, 0], F.log_softmax(z[:, 1:], 1)
    advantage = (X.sum(1) - value).detach()
    return c(value, X.sum(1)) - (log_p[:, 0] * advantage).mean() + 0.1 * (log_p * log_p.exp()).sum(1).mean()


OUTSIDE = {
    "L2": (lambda: net(5, 6, 3), CE, lambda m, c: c(m(X), Y) + penalty(m, 2)),
    "L1": (lambda: net(5, 6, 3), CE, lambda m, c: c(m(X), Y) + penalty(m, 1)),
    "KL": (lambda: net(5, 6, 3), CE, lambda m, c: c(z := m(X), Y) + F.kl_div(z.log_softmax(1), X[:, :3].softmax(1))),
    "auxiliary": (WithHidden, CE, lambda m, c: c(m(X), Y) + m.hidden.square().mean()),
    "generator": (lambda: net(5, 6, 3), nn.BCEWithLogitsLoss(), generator_step),
    "actor-critic": (lambda: net(5, 6, 3), nn.MSELoss(), actor_critic),
    "two modules": (Normed, CE, lambda m, c: c(m.second(torch.tanh(m.norm(m.first(X)))), Y)),
    "two backward passes": (lambda: net(5, 6, 3), CE, lambda m, c: (c(m(X), Y), penalty(m, 2))),
}
FAMILY = [so.LayerwiseNewton, so.KFAC, so.KFRA, so.KFLR]


def backward(losses):
    total = 0.0
    for loss in losses if isinstance(losses, tuple) else (losses,):
        loss.backward()
        total += loss.detach()
    return total


@pytest.mark.parametrize("make", FAMILY)
@pytest.mark.parametrize("term", OUTSIDE)
@pytest.mark.filterwarnings("ignore:reduction")
def test_terms_outside_of_the_criterion_are_an_error_or_trained_by_a_closure(term, make):
    build, criterion, loss_of = OUTSIDE[term]
    torch.manual_seed(0)
    model = build().double()
    # KFAC's and KFLR's curvatures want the criterion to be a likelihood, or convex, in the last layer's output.
    kwargs = {"curvature": "pch-abs"} if term in ("generator", "actor-critic") else {}
    optimizer = make(model, criterion, weight_decay=0.0, **kwargs)
    before = parameters(model)
    optimizer.zero_grad()
    backward(loss_of(model, criterion))
    with pytest.raises(RuntimeError, match=r"optimizer.step\(closure\).*No parameter and no state has changed"):
        optimizer.step()
    assert torch.equal(parameters(model), before)
    assert not optimizer.state

    def closure():
        optimizer.zero_grad()
        return backward(loss_of(model, criterion))

    losses = [float(optimizer.step(closure)) for _ in range(12)]
    assert all(b <= a + 1e-9 for a, b in zip(losses, losses[1:])), losses  # one batch: no step raises what is trained
    assert losses[-1] < losses[0] - 0.05 * abs(losses[0])


@pytest.mark.parametrize("make", FAMILY)
@pytest.mark.parametrize("given", [True, False], ids=["a parameter given", "parameters read"])
def test_a_criterion_that_takes_parameters_by_itself_is_evaluated_with_those_of_the_trial(given, make):
    torch.manual_seed(0)
    model = net(5, 6, 3)
    criterion = (
        so.criteria.FunctionCriterion(lambda z, y, w: F.cross_entropy(z, y) + 0.3 * w.square().sum())
        if given
        else so.criteria.FunctionCriterion(lambda z, y: F.cross_entropy(z, y) + penalty(model, 2))
    )
    optimizer = make(model, criterion, weight_decay=0.0, curvature="pch-abs")

    def closure():
        optimizer.zero_grad()
        loss = criterion(model(X), Y, model[0].weight) if given else criterion(model(X), Y)
        loss.backward()
        return loss

    before = parameters(model)
    closure()
    with pytest.raises(RuntimeError, match=r"parameters that the criterion takes by itself.*optimizer.step\(closure\)"):
        optimizer.step()
    assert torch.equal(parameters(model), before)
    losses = [optimizer.step(closure).item() for _ in range(8)]
    assert all(b <= a + 1e-9 for a, b in zip(losses, losses[1:])), losses
    assert losses[-1] < losses[0] - 0.05 * abs(losses[0])


@pytest.mark.parametrize("make", [so.LayerwiseNewton, so.KFRA, so.KFLR])  # KFAC draws labels at every call
def test_calls_of_the_criterion_for_a_log_are_no_part_of_the_loss(make):
    torch.manual_seed(0)
    model = net(5, 6, 3)
    twin = copy.deepcopy(model)
    optimizers = [make(m, CE, weight_decay=0.0) for m in (model, twin)]
    log = []
    for _ in range(4):
        for own, optimizer in zip((model, twin), optimizers):

            def closure(own=own, optimizer=optimizer):
                optimizer.zero_grad()
                loss = CE(own(X), Y) + penalty(own, 2)
                loss.backward()
                if own is model:
                    log.append(CE(own(X[:4]), Y[:4]))
                return loss

            optimizer.step(closure)
    assert torch.equal(parameters(model), parameters(twin))


def test_a_quadratic_penalty_outside_has_its_own_curvature():
    """A linear model, MSE and an L2 term: the loss is its own quadratic model, and the step ends at the minimum along it."""
    torch.manual_seed(0)
    model, criterion = nn.Linear(5, 3).double(), nn.MSELoss()
    optimizer = so.LayerwiseNewton(model, criterion, damping=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = criterion(model(X), X[:, :3]) + 0.3 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.param_groups[0]["rho"] == pytest.approx(1.0, rel=1e-6)


def test_penalties_of_frozen_parameters_and_of_other_nets_are_no_terms():
    torch.manual_seed(0)
    model, other = net(5, 6, 3), nn.Linear(2, 2)
    model[0].requires_grad_(False)
    optimizer = so.LayerwiseNewton(model, CE)
    (CE(model(X), Y) + model[0].weight.square().sum() + other.weight.square().sum()).backward()
    optimizer.step()


def test_a_backward_pass_before_zero_grad_does_not_count():
    torch.manual_seed(0)
    model = net(5, 6, 3)
    optimizer = so.LayerwiseNewton(model, CE)
    for forget in (optimizer.zero_grad, model.zero_grad):
        penalty(model, 2).backward()
        forget()
        CE(model(X), Y).backward()
        optimizer.step()


def test_clipped_and_noisy_gradients_are_the_users_own():
    torch.manual_seed(0)
    model = net(5, 6, 3)
    optimizer = so.LayerwiseNewton(model, CE)
    CE(model(X), Y).backward()
    nn.utils.clip_grad_value_(model.parameters(), 1e-2)
    for p in model.parameters():
        p.grad += 1e-4 * torch.randn_like(p)
    optimizer.step()


# --- closures -----------------------------------------------------------------------------------------------------------


def test_a_closure_that_draws_its_batch_is_refused():
    torch.manual_seed(0)
    model = net(5, 6, 3)
    optimizer, batches = so.LayerwiseNewton(model, CE), iter(range(100))

    def closure():
        optimizer.zero_grad()
        x = X * (1 + next(batches))
        loss = CE(model(x), Y) + penalty(model, 2)
        loss.backward()
        return loss

    before = parameters(model)
    with pytest.raises(RuntimeError, match="Draw the batch outside of the closure"):
        optimizer.step(closure)
    assert torch.equal(parameters(model), before)


def test_an_error_within_a_trial_takes_the_step_back():
    torch.manual_seed(0)
    model, calls = net(5, 6, 3), []
    optimizer = so.LayerwiseNewton(model, CE)

    def closure():
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("interrupted")
        optimizer.zero_grad()
        loss = CE(model(X), Y) + penalty(model, 2)
        loss.backward()
        return loss

    before = parameters(model)
    with pytest.raises(KeyError, match="interrupted"):
        optimizer.step(closure)
    assert torch.equal(parameters(model), before)
    assert not optimizer.state
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (CE(model(X), Y) + penalty(model, 2)).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients)


def test_a_closure_draws_the_same_numbers_in_a_step_and_leaves_buffers_as_one_call_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    twin = copy.deepcopy(model)
    optimizer = so.LayerwiseNewton(model, CE)

    def closure(own=model, zero=optimizer.zero_grad):
        zero()
        loss = CE(own(X), Y) + penalty(own, 2)
        loss.backward()
        return loss

    state = torch.get_rng_state()
    loss = optimizer.step(closure)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    assert closure(twin, twin.zero_grad).item() == loss.item()
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(list(model.buffers()), list(twin.buffers()))
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


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
    tape = Tape(linear_layers(model), CE, diagonal=False, model=model, keep_inputs=True)
    CE(model(X), Y).backward()
    local = LocalLoss(model, CE, tape.losses, {p: n for n, p in model.named_parameters()}, 1.0, 0, tape)
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
    tape = Tape(linear_layers(model), criterion, diagonal=False, model=model, keep_inputs=True)
    criterion(model(X), y).backward()
    here = {p: n for n, p in model.named_parameters()}
    for offset in range(4):
        local = LocalLoss(model, criterion, tape.losses, here, 0.25, offset, tape)
        assert local.instances == 8
        rows = (y != -100).nonzero().flatten()[offset::4]
        assert local.start == pytest.approx(criterion(model(X[rows]), y[rows]).item(), rel=1e-12)


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


def test_a_function_without_a_second_derivative_is_named_in_the_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(7, 5), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = so.LayerwiseNewton(model, CE)
    before = parameters(model)
    CE(model(torch.arange(48).reshape(24, 2) % 7), Y).backward()
    with pytest.raises(RuntimeError, match="expected a loss that autograd can differentiate twice.*take EACG"):
        optimizer.step()
    assert torch.equal(parameters(model), before)
