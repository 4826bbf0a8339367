"""Criteria with parameters, without second derivatives or without a curvature, and losses that grow."""

import contextlib
import copy
import warnings

import pytest
import torch
from helpers.optimizers import ALL, FIXED, parameters
from helpers.training import assert_same
from helpers.unusual import X, batch, every, network, run
from torch import nn
from torch.utils.checkpoint import checkpoint

import secondorder as so
from secondorder.criteria import autograd


class Weighted(nn.Module):
    """A criterion with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.logs = nn.Parameter(torch.full((3,), 0.2).double())

    def forward(self, output, target):
        hot = nn.functional.one_hot(target, 3)
        return ((output - hot) ** 2 * torch.exp(-self.logs) + self.logs).mean()


@pytest.mark.parametrize("name", [name for name in FIXED if name != "KFAC-lr"])  # whose criterion is a likelihood
@pytest.mark.parametrize("group", [False, True])
def test_parameters_of_the_criterion_get_the_fallback(name, group):
    model, criterion = network(), Weighted()
    options = {"max_increase": float("inf")} if name.startswith("KBFGS") else {}
    optimizer = ALL[name](model, criterion, weight_decay=0.0, **options)
    lr = 0.1
    if group:
        lr = 0.05
        optimizer.add_param_group({"params": criterion.parameters(), "lr": lr})
    x, y = batch()
    (gradient,) = torch.autograd.grad(criterion(model(x), y), criterion.logs)
    with pytest.warns(UserWarning, match="'criterion.logs'.* updated by the fallback"):
        run(model, optimizer)
    torch.testing.assert_close(criterion.logs.detach(), 0.2 - lr * gradient)
    before = [list(each["params"]) for each in optimizer.param_groups]
    with pytest.raises(ValueError, match="parameters of the model, or of the criterion"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2)), *criterion.parameters()]})
    for old, each in zip(before, optimizer.param_groups, strict=True):
        assert list(map(id, old)) == list(map(id, each["params"]))


def test_a_quadratic_model_leaves_the_parameters_of_the_criterion_to_others_and_says_so():
    with pytest.warns(UserWarning, match="'criterion.logs', are not trained by LayerwiseNewton"):
        optimizer = so.LayerwiseNewton(network(), Weighted())
    assert run(optimizer._model, optimizer, steps=4)[-1] < 1


def own_cross_entropy(z, y):
    return (z.logsumexp(1) - z.gather(1, y.unsqueeze(1)).squeeze(1)).mean()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["EACG", "LayerwiseNewton", "KFRA", "KFLR", "KFLR-lr", "KBFGS"])
def test_a_criterion_and_functions_without_a_formula_may_be_checkpointed(name, frozen):
    """The double backward that they need saves tensors of its own, and calls what is checkpointed once more."""
    found = []
    for checkpointed in (False, True):
        model, (x, y), calls = network(), batch(), []
        model[1], model[3] = nn.Mish(), nn.Hardswish()
        model[0].requires_grad_(not frozen)
        optimizer = ALL[name](model, own_cross_entropy)

        def whole(x, y, model=model, optimizer=optimizer, calls=calls):
            calls.append(0)
            return optimizer.criterion(model(x), y)

        def loss(checkpointed=checkpointed, whole=whole, x=x, y=y):
            value = checkpoint(whole, x, y, use_reentrant=False) if checkpointed else whole(x, y)
            return (2 * value).log().exp() / 2  # what follows has the whole checkpoint made once more, its last call too

        run(model, optimizer, loss, steps=3)
        found.append(parameters(model))
    assert len(calls) >= 6  # the last model's, the checkpointed one
    torch.testing.assert_close(*found)


def test_the_empirical_fisher_matrix_needs_no_double_backward(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("double backward")

    monkeypatch.setattr(autograd, "autograd_hessian", forbidden)
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(4, 5), nn.Mish(), nn.Linear(5, 6)).double(), nn.CTCLoss()
    optimizer = so.EACG(model, criterion, curvature="fisher-empirical")
    x, y = torch.randn(9, 2, 4).double(), torch.randint(1, 6, (2, 3))
    lengths = torch.tensor([9, 9]), torch.tensor([3, 3])
    losses = run(model, optimizer, lambda: criterion(model(x).log_softmax(-1), y, *lengths), 10)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("make", [so.EACG, so.LayerwiseNewton])
def test_a_criterion_without_second_derivatives_is_refused_with_what_to_do(make):
    model, criterion = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), nn.MultiMarginLoss()
    optimizer = make(model, criterion)

    def closure():
        loss = criterion(model(torch.randn(20, 4)), torch.randint(3, (20,)))
        loss.backward()
        return loss

    message = "differentiated twice, but .*multi_margin_loss.*; take EACG with curvature='fisher-empirical'"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step(closure)
    optimizer.remove_hooks()
    optimizer = make(model, criterion, curvature="fisher-empirical")
    if make is so.EACG:
        optimizer.step(closure)
    else:  # the curvature does without, but the quadratic model does not
        with pytest.raises(RuntimeError, match=message):
            optimizer.step(closure)


@every
def test_a_warning_that_is_an_error_changes_nothing(name):
    """That a loss has grown a thousandfold is said before the step."""
    model, (x, _) = network(), batch()
    optimizer = ALL[name](model, nn.MSELoss())

    def scaled(factor):
        return lambda: optimizer.criterion(model(x), factor * torch.ones(10, 3).double())

    run(model, optimizer, scaled(1.0), steps=3)
    before = copy.deepcopy([parameters(model), optimizer.state_dict()])
    with pytest.raises(UserWarning, match="has grown a thousandfold"):
        run(model, optimizer, scaled(1e4))
    assert_same([parameters(model), optimizer.state_dict()], before)
    run(model, optimizer, scaled(1.0))


@pytest.mark.parametrize("name", ["EACG", "EACG-exact", "KFLR"])
def test_a_loss_that_grows_a_thousandfold_is_said_once(name):
    model = network()
    optimizer = ALL[name](model, nn.MSELoss())
    x, _ = batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for factor in (1.0, 1.0, 10.0, 100.0, 1e4, 1e5, 1e6):
            target = factor * torch.ones(10, 3).double()
            run(model, optimizer, lambda target=target: optimizer.criterion(model(x), target))
    (message,) = [str(w.message) for w in caught if "has grown a thousandfold" in str(w.message)]
    assert ("alpha" if name.startswith("EACG") else "damping") in message


def test_noise_of_a_net_that_fits_everything_is_no_growth():
    growth = so.optim._growth.LossGrowth("EACG", "lower lr")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The last losses are above a thousand times the lowest average, but below the first loss.
        for loss in [1.0, 0.1, *[1e-9] * 150, 0.5, *[1e-9] * 150, float("nan"), *[0.5] * 10]:
            growth.observe(loss)
        assert 0.4 > growth.average > 1e3 * growth.lowest
        signs = so.optim._growth.LossGrowth("EACG", "lower lr")
        for loss in (-1.0, 1.0, 5000.0):  # a likelihood may be of either sign
            signs.observe(loss)


def last_block(model, criterion, loss, curvature):
    """The bias Hessian of a net's last layer after a step of no length."""
    optimizer = so.EACG(model, criterion, lr=0.0, curvature=curvature)
    loss().backward()
    optimizer.step()
    optimizer.remove_hooks()
    model.zero_grad()
    return optimizer.state[model[-1].weight]["factors"]["bias_hessian"]


@pytest.mark.parametrize("curvature", ["pch-abs", "gauss-newton"])
def test_a_criterion_without_curvature_gives_the_empirical_fisher_block_and_says_so(curvature):
    """Absolute values bend nowhere: the last layer has E[delta delta^T], and the recursion goes on from there."""
    torch.manual_seed(0)
    x, y, criterion = torch.randn(7, 4).double(), torch.randn(7, 3).double(), nn.L1Loss()
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with pytest.warns(UserWarning, match="layer '2' enters a criterion whose Hessian is zero"):
        block = last_block(model, criterion, lambda: criterion(model(x), y), curvature)
    # Of each instance delta = sign(z - y) / (7 * 3) for the mean; 7 times that is its own loss' gradient.
    delta = torch.sign(model(x).detach() - y) / 3
    torch.testing.assert_close(block, delta.T @ delta / 7)


def test_a_criterion_that_compares_instances_gives_the_empirical_fisher_block_and_says_so():
    """A loss of differences of scores does not see a shift of all of them: the rows of its Hessian sum to zero."""
    torch.manual_seed(0)
    x, y = torch.randn(7, 4).double(), torch.randn(7).double()

    def ranking(scores, target):
        return nn.functional.softplus((scores.mT - scores) * (target.unsqueeze(1) - target).sign()).mean()

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    criterion = so.criteria.FunctionCriterion(ranking)
    with pytest.warns(UserWarning, match="layer '2' enters a criterion whose Hessian is zero, or is in sum over instances"):
        block = last_block(model, criterion, lambda: criterion(model(x), y), "pch-abs")
    scores = model(x).detach().requires_grad_()
    (delta,) = torch.autograd.grad(ranking(scores, y), scores)
    torch.testing.assert_close(block, 7 * delta.T @ delta)


def test_a_distance_that_is_zero_is_an_error_that_says_what_to_do():
    """Autograd takes the gradient of a norm at zero for zero; the second derivative there is infinite."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 4).double(), torch.randint(2, (6,))

    def triplet(z, target):
        distances, same = (z.unsqueeze(1) - z).norm(dim=2), target.unsqueeze(1) == target
        return nn.functional.softplus((distances * same).max(1).values - (distances + 99 * same).min(1).values).mean()

    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x[3:] = x[:3]  # whose distances to one another are zero
    y[3:] = 1 - y[:3]
    before, trained = parameters(model), []
    for options in ({}, {"curvature": "fisher-empirical"}):
        optimizer = so.EACG(model, triplet, **options)
        optimizer.criterion(model(x), y).backward()
        refused = pytest.raises(so.NonFiniteError, match="take EACG with curvature='fisher-empirical'")
        with contextlib.nullcontext() if options else refused:
            optimizer.step()
        trained.append(not torch.equal(parameters(model), before))
        optimizer.remove_hooks()
        model.zero_grad()
    assert trained == [False, True]


def test_beside_a_criterion_with_curvature_one_without_adds_nothing():
    torch.manual_seed(0)
    x, y, model = torch.randn(7, 4).double(), torch.randn(7, 3).double(), nn.Sequential(nn.Linear(4, 3)).double()
    criterion = so.criteria.FunctionCriterion(lambda z, t, kind: kind(z, t))

    def loss(weight):
        z = model(x)
        squares, values = criterion(z, y, nn.functional.mse_loss), criterion(z, y, nn.functional.l1_loss)
        return squares + weight * values if weight else squares

    torch.testing.assert_close(*(last_block(model, criterion, lambda w=w: loss(w), "pch-abs") for w in (0.0, 0.3)))


@pytest.mark.parametrize("optimizer", [so.KFAC, so.KFLR, so.KFRA])
@pytest.mark.parametrize("squeeze", [lambda p: p.squeeze(-1), lambda p: p.view(-1)], ids=["squeeze", "view"])
def test_probabilities_of_one_output_are_those_of_the_logits(squeeze, optimizer):
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)), nn.BCELoss()
    made, losses, y = optimizer(model, criterion), [], (X[:, 0] > 0).float()
    for _ in range(12):
        made.zero_grad()
        loss = criterion(squeeze(model(X).sigmoid()), y)
        loss.backward()
        made.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
