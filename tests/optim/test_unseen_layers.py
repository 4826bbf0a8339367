"""Layers and passes that an optimizer's hooks do not see, or see twice: it trains what is left, or an error says why."""

import pytest
import torch
from helpers.optimizers import ALL, parameters
from helpers.unusual import LABELS, X, batch, every, network, run
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import secondorder as so


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
