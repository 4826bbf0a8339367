"""Terms outside of the criterion: an error without a closure, and part of the loss with one; what closures may do."""

import copy

import pytest
import torch
from helpers.losses import CE, FAMILY, Normed, X, Y, net, penalty
from helpers.optimizers import parameters
from torch import nn
from torch.nn import functional as F

import secondorder as so

pytestmark = pytest.mark.filterwarnings("ignore:secondorder")


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


def equation(m, c):
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
    return c(slope, X)


OUTSIDE = {
    "L2": (lambda: net(5, 6, 3), CE, lambda m, c: c(m(X), Y) + penalty(m, 2)),
    "L1": (lambda: net(5, 6, 3), CE, lambda m, c: c(m(X), Y) + penalty(m, 1)),
    "KL": (lambda: net(5, 6, 3), CE, lambda m, c: c(z := m(X), Y) + F.kl_div(z.log_softmax(1), X[:, :3].softmax(1))),
    "auxiliary": (WithHidden, CE, lambda m, c: c(m(X), Y) + m.hidden.square().mean()),
    "generator": (lambda: net(5, 6, 3), nn.BCEWithLogitsLoss(), generator_step),
    "actor-critic": (lambda: net(5, 6, 3), nn.MSELoss(), actor_critic),
    "derivatives": (lambda: net(5, 6, 1), nn.MSELoss(), equation),
    "two modules": (Normed, CE, lambda m, c: c(m.second(torch.tanh(m.norm(m.first(X)))), Y)),
    "two backward passes": (lambda: net(5, 6, 3), CE, lambda m, c: (c(m(X), Y), penalty(m, 2))),
}


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
    kwargs = {"curvature": "pch-abs"} if term in ("generator", "actor-critic", "derivatives") else {}
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


@pytest.mark.parametrize("make", [so.LayerwiseNewton, so.KFRA, so.KFLR])
def test_a_criterion_that_takes_derivatives_alone_is_trained_by_a_closure(make):
    """The loss does not depend on the criterion's argument itself."""
    torch.manual_seed(0)
    model = net(5, 6, 1)
    optimizer = make(model, lambda u, x: (torch.autograd.grad(u.sum(), x, create_graph=True)[0] - x).square().mean())

    def closure():
        optimizer.zero_grad()
        x = X.clone().requires_grad_()
        loss = optimizer.criterion(model(x), x)
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(closure)) for _ in range(12)]
    assert all(b <= a + 1e-9 for a, b in zip(losses, losses[1:])), losses
    assert losses[-1] < 0.8 * losses[0]


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
