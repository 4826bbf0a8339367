"""Models and criteria that no curvature covers as a whole: the rest trains, or an error says why."""

import contextlib
import copy
import re
import warnings

import pytest
import torch
from helpers.optimizers import ALL, FIXED, parameters
from helpers.training import assert_same
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import secondorder as so
from secondorder.criteria import autograd

every = pytest.mark.parametrize("name", ALL)
fixed = pytest.mark.parametrize("name", FIXED)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch():
    torch.manual_seed(1)
    return torch.randn(10, 4).double(), torch.randint(3, (10,))


def run(model, optimizer, loss=None, steps=1):
    x, y = batch()
    losses = []
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            value = optimizer.criterion(model(x), y) if loss is None else loss()
            value.backward()
            return value

        losses.append(float(optimizer.step(closure).detach()))
    return losses


CHANGES = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}


@fixed
@pytest.mark.parametrize("how", CHANGES)
def test_a_layer_that_computes_its_weight_gets_the_fallback_and_says_why(name, how):
    model = network()
    CHANGES[how](model[2])
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = run(model, optimizer, steps=6)
    assert losses[-1] < losses[0]
    (said,) = [str(w.message) for w in caught if "fallback" in str(w.message)]
    assert "layer '2' computes its weight from other parameters" in said


@every
@pytest.mark.parametrize("how", CHANGES)
def test_a_layer_that_is_changed_after_construction_is_an_error(name, how):
    model = network()
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    run(model, optimizer)
    CHANGES[how](model[2])
    before = parameters(model)
    with pytest.raises(RuntimeError, match="layer '2' has been given a parametrization, norm or pruning mask since"):
        run(model, optimizer)
    assert torch.equal(parameters(model), before)


def test_nets_of_such_layers_alone_are_refused_with_the_reason():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="layer '0' computes its weight from other parameters .*EigenAdam trains any model"):
        so.EACG(model, nn.MSELoss())
    tied = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "head": nn.Linear(2, 3)})
    tied["head"].weight = tied["embedding"].weight
    with pytest.raises(ValueError, match="same bias. secondorder.EigenAdam trains"):  # and not that they are frozen
        so.EACG(tied, nn.MSELoss())
    with pytest.raises(ValueError, match="got the lazy '0'; call the model once first"):
        so.EACG(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), nn.MSELoss())


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


def test_reasons_for_what_no_recorded_loss_reaches():
    trunk, heads, criterion = network()[:4], nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 2)]).double(), nn.CrossEntropyLoss()
    model, (x, y) = nn.ModuleList([trunk, heads]), batch()
    optimizer = so.EACG(model, criterion)

    def loss():
        h = trunk(x)
        return criterion(heads[0](h), y) + heads[1](h).square().mean()  # with a criterion of its own

    with pytest.warns(
        UserWarning, match=r"'1\.1\.weight', '1\.1\.bias' \(no recorded loss depends on what its layer returns in training mode\)"
    ):
        run(model, optimizer, loss)


@every
def test_an_ensemble_of_other_parameters_leaves_no_gradients(name):
    model, (x, y) = network(), batch()
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    stacked = {n: p.detach().requires_grad_() for n, p in stack_module_state([network() for _ in range(2)])[0].items()}

    def loss():
        outputs = vmap(lambda p: functional_call(model, p, (x,)))(stacked)
        return nn.functional.cross_entropy(outputs.flatten(0, 1), y.repeat(2))

    with pytest.raises(RuntimeError, match="They must be those of the model.s own parameters: a functional_call with others"):
        run(model, optimizer, loss)


@every
def test_parameters_instead_of_a_model_give_the_recipe(name):
    cls = type(ALL[name](network(), nn.CrossEntropyLoss()))
    with pytest.raises(TypeError, match=rf"optimizer=lambda params, \*\*options: secondorder.{cls.__name__}\(net.module_, "):
        cls(network().parameters(), lr=0.1)
    with pytest.raises(TypeError, match="expected criterion to be an nn.Module or a function .* got none"):
        cls(network())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["EACG", "LayerwiseNewton", "KFLR"])
def test_checkpoints(name, reentrant):
    model, (x, y) = network(), batch()
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    whole = nn.Module()
    x.requires_grad_()

    def loss():
        return optimizer.criterion(model[4](checkpoint(model[:4], x, use_reentrant=reentrant)), y)

    if reentrant:
        with pytest.raises(RuntimeError, match="layer '0' is inside a checkpoint of the reentrant kind.*use_reentrant=False"):
            run(whole, optimizer, loss)
    elif name == "EACG":
        run(whole, optimizer, loss)
        plain = network()
        run(plain, ALL[name](plain, nn.CrossEntropyLoss()))
        torch.testing.assert_close(parameters(model), parameters(plain))


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


@every
def test_layers_wider_than_the_limit_get_the_fallback_and_say_so(name):
    if name == "KBFGSL":
        return  # its factor of the outputs has no more than `memory` rows
    model = network()
    optimizer = ALL[name](model, nn.CrossEntropyLoss(), max_factor_dim=5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = run(model, optimizer, steps=5)
    assert losses[-1] < losses[0]
    said = [str(w.message) for w in caught]
    assert sum("layer '2' has 6 outputs, more than max_factor_dim = 5" in message for message in said) == 1
    assert "2 (5 -> 6): no curvature" in repr(optimizer)
    key = "inverse_output" if name.startswith("KBFGS") else "factors"
    assert [key in optimizer.state.get(layer.weight, {}) for layer in (model[0], model[2], model[4])] == [True, False, True]
    with pytest.raises(ValueError, match="max_factor_dim to be an int >= 1, or None"):
        ALL[name](network(), nn.CrossEntropyLoss(), max_factor_dim=0)


def test_below_a_wide_layer_the_recursion_starts_from_the_fisher_block():
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 40)).double(), batch()
    optimizer = so.EACG(model, nn.CrossEntropyLoss(), max_factor_dim=39)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(model, optimizer)
    assert any("leads to layer '2', which is too wide for a curvature" in str(w.message) for w in caught)
    torch.manual_seed(0)
    again = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 40)).double()
    z = again[0](x).detach().requires_grad_()
    (deltas,) = torch.autograd.grad(nn.functional.cross_entropy(again[1:](z), y), z)
    torch.testing.assert_close(optimizer.state[model[0].weight]["factors"]["bias_hessian"], 10 * deltas.T @ deltas)


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


# What a step has not seen, and why

X, LABELS = torch.linspace(-1, 1, 60).view(12, 5), torch.arange(12) % 3


def by_hand(model, criterion):
    loss, parameters = criterion(model(X), LABELS), list(model.parameters())
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.grad = gradient
    return loss


def by_another(model, criterion):
    loss = nn.functional.cross_entropy(model(X), LABELS)
    loss.backward()
    return loss


def in_eval_mode(model, criterion):
    model.eval()
    loss = criterion(model(X), LABELS)
    loss.backward()
    return loss


def by_a_part(model, criterion):
    loss = criterion(model(X), LABELS)[0]
    loss.backward()
    return loss


class WithNumbers(nn.Module):
    def forward(self, output, target):
        return nn.functional.cross_entropy(output, target), {"rows": len(target)}


class Adjoint(torch.autograd.Function):
    """Calls a model without a graph, and again in the backward pass, as adjoint methods do."""

    @staticmethod
    def forward(ctx, model, x, *parameters):
        ctx.model, ctx.x, ctx.parameters = model, x, parameters
        return model(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            return None, None, *torch.autograd.grad(ctx.model(ctx.x), ctx.parameters, grad)


def by_an_adjoint(model, criterion):
    loss = criterion(Adjoint.apply(model, X, *model.parameters()), LABELS)
    loss.backward()
    return loss


MISSED = [
    (by_an_adjoint, nn.CrossEntropyLoss(), "Adjoint, a torch.autograd.Function, does not show the layers .*take EigenAdam"),
    (by_hand, nn.CrossEntropyLoss(), r"no backward\(\) has gone through what it returned: .*torch.autograd.grad"),
    (by_another, nn.CrossEntropyLoss(), "has not been called since the last step"),
    (in_eval_mode, nn.CrossEntropyLoss(), "not on what linear layers returned in training mode"),
    (by_a_part, WithNumbers(), "the criterion returned a tuple where the loss alone is expected"),
]


@pytest.mark.parametrize("optimizer", [so.EACG, so.LayerwiseNewton, so.KFAC, so.KFRA, so.KFLR])
@pytest.mark.parametrize(("use", "criterion", "reason"), MISSED, ids=lambda each: getattr(each, "__name__", ""))
def test_the_reason_why_nothing_was_recorded_is_named(use, criterion, reason, optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    made, before = optimizer(model, criterion), [p.clone() for p in model.parameters()]
    use(model, criterion)
    with pytest.raises(RuntimeError, match=f"no call of the criterion .*{reason}"):
        made.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("optimizer", [so.KBFGS, so.KBFGSL])
@pytest.mark.parametrize(
    ("use", "reason"), [(by_hand, "torch.autograd.grad"), (by_an_adjoint, "as of an adjoint method: for these take EigenAdam")]
)
def test_gradients_by_hand_in_a_closure_are_refused(optimizer, use, reason):
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), nn.CrossEntropyLoss()
    made, before = optimizer(model, criterion), [p.clone() for p in model.parameters()]

    def closure():
        made.zero_grad()
        return use(model, criterion)

    with pytest.raises(RuntimeError, match=rf"expected a closure that calls loss.backward\(\) .*{reason}"):
        made.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(so.EACG, {"curvature_every": 4}), (so.LayerwiseNewton, {"curvature_every": 4}), (so.KFAC, {})],
)
def test_a_layer_that_is_unfrozen_between_renewals_gets_its_curvature(optimizer, options):
    """Without a word, and never the fallback: at once where steps are recorded, else with the next renewal."""
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), nn.CrossEntropyLoss()
    model[0].requires_grad_(False)
    made = optimizer(model, criterion, fallback="error", **options)
    start = model[0].weight.clone()
    for step in range(13):
        if step == 6:
            model[0].requires_grad_(True)
            made.add_param_group({"params": list(model[0].parameters())})
        made.zero_grad()
        criterion(model(X), LABELS).backward()
        made.step()
        if step >= 8:
            assert "factors" in made.state[model[0].weight]
    assert not torch.equal(model[0].weight, start)


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


class Reversible(torch.autograd.Function):
    """Calls layers without a graph, and again in the backward pass, by a backward() of its own, as reversible nets do."""

    @staticmethod
    def forward(ctx, layers, x, *parameters):
        ctx.layers, ctx.x, ctx.others = layers, x, [None] * len(parameters)
        return layers(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.layers(x), grad)
        return None, x.grad, *ctx.others


@pytest.mark.filterwarnings("ignore:secondorder. (no curvature|the loss multiplies)")
@pytest.mark.parametrize("optimizer", [so.KBFGS, so.KBFGSL])
def test_a_backward_within_the_backward_of_a_closure_is_torchs_own(optimizer):
    """Its layers are not seen, and get the fallback; the others' step is that of a net that calls F.linear there."""
    found = []
    for reversible in (True, False):
        model, (x, y) = network(), batch()
        made, hidden = optimizer(model, nn.CrossEntropyLoss()), model[2:4]

        def middle(h, hidden=hidden, reversible=reversible):
            if reversible:
                return Reversible.apply(hidden, h, *hidden.parameters())
            return nn.functional.linear(h, hidden[0].weight, hidden[0].bias).tanh()

        def loss(model=model, made=made, middle=middle, x=x, y=y):
            return made.criterion(model[4](middle(model[:2](x))), y)

        run(model, made, loss, steps=3)
        found.append(parameters(model))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["EACG", "LayerwiseNewton", "KFRA", "KFLR"])
def test_what_the_tape_differentiates_leaves_gradients_alone(name):
    """A reversible function between two layers adds to gradients whenever a pass goes through it."""
    found = []
    for reversible in (True, False):
        model, (x, y) = network(), batch()
        optimizer, hidden = ALL[name](model, nn.CrossEntropyLoss()), model[2:4]
        for _ in range(2):  # the second adds to the gradients of the first
            h = model[:2](x)
            h = Reversible.apply(hidden, h, *hidden.parameters()) if reversible else hidden(h)
            optimizer.criterion(model[4](h), y).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found)


@every
@pytest.mark.parametrize("how", ["group", "layer"])
def test_parameters_of_layers_that_have_been_replaced_are_refused(name, how):
    model = network()
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    run(model, optimizer)
    model[4] = nn.Linear(6, 3).double()
    state, before = copy.deepcopy(list(optimizer.state.values())), parameters(model)
    with pytest.raises(ValueError, match="got 2 others; where modules have been added or replaced since, make a new optimizer"):
        if how == "layer":
            optimizer.add_param_group({"params": model[4].parameters()})
        else:
            optimizer.param_groups[0]["params"] = list(model.parameters())
            run(model, optimizer)
    assert torch.equal(parameters(model), before)
    assert_same(list(optimizer.state.values()), state)


@every
def test_a_weight_that_takes_the_place_of_a_layers_own_is_trained(name):
    model = network()
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    run(model, optimizer)
    weight = model[2].weight = nn.Parameter(model[2].weight + 0.1)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    before = weight.clone()
    run(model, optimizer)
    assert not torch.equal(weight, before)


@every
def test_weights_of_other_shapes_are_refused(name):
    """As those of a net whose units have been pruned."""
    model = network()
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    run(model, optimizer)
    model[2].weight, model[2].bias = nn.Parameter(model[2].weight[:4].detach()), nn.Parameter(model[2].bias[:4].detach())
    model[4].weight = nn.Parameter(model[4].weight[:, :4].detach())
    optimizer.param_groups[0]["params"] = list(model.parameters())
    before = parameters(model)
    with pytest.raises(RuntimeError, match=r"got \[4, 5\] in place of \[6, 5\] in layer '2'; make the optimizer anew"):
        run(model, optimizer)
    assert torch.equal(parameters(model), before)


@every
@pytest.mark.parametrize("kind", ["sparse", "csr", "nested"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_inputs_that_are_sparse_or_nested_are_refused_with_what_to_write(name, kind):
    model, (x, y) = network(), batch()
    optimizer = ALL[name](model, nn.CrossEntropyLoss())
    if kind == "nested":
        x = torch.nested.nested_tensor([x[:4], x[4:]], layout=torch.jagged)
    else:
        x = x.to_sparse() if kind == "sparse" else x.to_sparse_csr()
    write = "the rows alone, x.values()" if kind == "nested" else "x.to_dense()"
    with pytest.raises(TypeError, match=rf"layer '0': expected an input that is an ordinary tensor, .* {re.escape(write)}"):
        run(model, optimizer, lambda: optimizer.criterion(model(x).values() if kind == "nested" else model(x), y))
