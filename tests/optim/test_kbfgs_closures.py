"""KBFGS and KBFGSL: closures that differentiate, call layers several times, leave some out, or checkpoint them."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import secondorder as so
from secondorder.optim._kbfgs.closure_pass import ClosurePass
from secondorder.optim._kbfgs.trials import kept_gradients

both = pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def gradient_penalty(model, x, y):
    x = x.clone().requires_grad_()
    output = model(x)
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    return (output - y).square().mean() + 0.3 * (slope.norm(dim=1) - 1).square().mean()


def equation(model, x, y):
    """The residual of u_xx = y alone: the last layer's output is differentiated away, its weight is not."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
    return (second[:, :2] - y).square().mean()


def sobolev(model, x, y):
    x = x.clone().requires_grad_()
    output = model(x)
    slopes = [torch.autograd.grad(output[:, k].sum(), x, create_graph=True)[0] for k in range(2)]
    return (output - y).square().mean() + sum((slope - y[:, :1]).square().mean() for slope in slopes)


def one_step_of_maml(model, x, y):
    names = [name for name, _ in model.named_parameters()]
    inner = (model(x[:5]) - y[:5]).square().mean()
    slopes = torch.autograd.grad(inner, list(model.parameters()), create_graph=True)
    adapted = {n: p - 0.1 * g for n, p, g in zip(names, model.parameters(), slopes, strict=True)}
    return (functional_call(model, adapted, (x[5:],)) - y[5:]).square().mean()


@both
def test_a_closure_that_reads_the_gradient_of_an_input_is_told_what_to_write(cls):
    model, (x, y) = network(), data()
    optimizer = cls(model, nn.MSELoss())
    before = copy.deepcopy(model.state_dict())

    def closure():
        inputs = x.clone().requires_grad_()
        optimizer.criterion(model(inputs), y).backward()
        worse = inputs.detach() + 0.1 * inputs.grad.sign()
        optimizer.zero_grad()
        loss = optimizer.criterion(model(worse), y)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"failed in its second call.* Take it by torch.autograd.grad\(loss, x\)"):
        optimizer.step(closure)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


LOSSES = [gradient_penalty, equation, sobolev, one_step_of_maml]


def data():
    torch.manual_seed(1)
    return torch.randn(11, 4).double(), torch.randn(11, 2).double()


def outputs_of(model, loss, *args):
    """Every layer's outputs, by calls, and what autograd knows of dL/dz there."""
    outputs, handles = {}, []
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            handles.append(
                layer.register_forward_hook(lambda module, args, output: outputs.setdefault(module, []).append(output))
            )
    value = loss(model, *args)
    for handle in handles:
        handle.remove()
    flat = [z for zs in outputs.values() for z in zs]
    slopes = iter(torch.autograd.grad(value, flat, allow_unused=True))
    return {layer: [(z.detach(), next(slopes)) for z in zs] for layer, zs in outputs.items()}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("parameters", [True, False])
def test_what_a_pass_records_is_what_backward_has_computed(loss, parameters):
    model, (x, y) = network(), data()
    found = outputs_of(model, loss, x, y)
    layers = {layer: name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    made = ClosurePass(layers, {}, -1.0, parameters=parameters)

    def closure():
        value = loss(model, x, y)
        value.backward()
        return value

    with kept_gradients(list(model.parameters()), None), made:
        made.run(closure, "test")
        assert all((p.grad is not None) >= parameters for p in list(model.parameters())[:-1])
        assert parameters or all(p.grad is None for p in model.parameters())
    for layer, pairs in found.items():
        pairs = [(z, g) for z, g in pairs if g is not None]
        assert (layer in made.layers) == bool(pairs)
        if pairs:
            torch.testing.assert_close(made.layers[layer].gradient, -sum(g.sum(0) for _, g in pairs))
            torch.testing.assert_close(made.layers[layer].mean_preactivation, torch.cat([z for z, _ in pairs]).mean(0))


@pytest.mark.filterwarnings("ignore:secondorder")  # a weight whose layer's output is differentiated away has no curvature
@both
@pytest.mark.parametrize("loss", LOSSES)
def test_closures_that_differentiate_train(cls, loss):
    model, (x, y) = network(), data()
    optimizer, losses = cls(model, nn.MSELoss(), lr=0.1), []

    def closure():
        optimizer.zero_grad()
        value = loss(model, x, y)
        value.backward()
        return value

    for _ in range(8):
        losses.append(float(optimizer.step(closure)))
        assert all(p.requires_grad for p in model.parameters())
    assert losses[-1] < losses[0]


class Dropping(nn.Module):
    """A layer that is left out at random, by a generator that no optimizer knows of."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.random = random.Random(4)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if self.random.random() < 0.5:
            h = torch.tanh(self.middle(h))
        return self.last(h)


@both
def test_layers_that_are_left_out_by_chance(cls):
    torch.manual_seed(0)
    model, (x, y) = Dropping().double(), data()
    optimizer = cls(model, nn.MSELoss(), max_increase=float("inf"), lr=0.1)

    def closure():
        optimizer.zero_grad()
        value = (model(x) - y).square().mean()
        value.backward()
        return value

    for _ in range(20):
        optimizer.step(closure)
    counts = optimizer.diagnostics()
    assert 0 < counts["middle"]["skipped"] < counts["middle"]["step"] < 20
    assert counts["middle"]["updated"] + counts["middle"]["skipped"] == counts["middle"]["step"]
    assert counts["first"]["updated"] == counts["first"]["step"] == 20


@both
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(cls, reentrant):
    torch.manual_seed(0)
    model, (x, y) = network(), data()
    plain = copy.deepcopy(model)
    if reentrant:
        x.requires_grad_()

    def step(net, forward):
        optimizer = cls(net, nn.MSELoss(), lr=0.1)

        def closure():
            optimizer.zero_grad()
            value = (forward(net) - y).square().mean()
            value.backward()
            return value

        return optimizer.step(closure)

    def checkpointed(net):
        return net[2:](checkpoint(net[:2], x, use_reentrant=reentrant))

    before = [p.clone() for p in model.parameters()]
    if reentrant:
        with pytest.raises(RuntimeError, match="layer '0' is inside a checkpoint .* use_reentrant=False"):
            step(model, checkpointed)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    else:
        step(model, checkpointed)
        step(plain, lambda net: net(x))
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q)


@pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL, so.LayerwiseNewton, so.KFRA])
def test_closures_may_clip_gradients_after_backward(cls):
    found, (x, y) = [], data()
    for clipped in (False, True):
        model = network()
        optimizer = cls(model, nn.MSELoss())

        def closure(model=model, optimizer=optimizer, clipped=clipped):
            optimizer.zero_grad()
            model.zero_grad()
            loss = optimizer.criterion(model(x), y) + 1e-3 * sum(p.square().sum() for p in model.parameters())
            loss.backward()
            for p in model.parameters() if clipped else ():
                p.grad.clamp_(-100, 100)
            return loss

        for _ in range(3):
            optimizer.step(closure)
        found.append([p.detach() for p in model.parameters()] + [p.grad for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@both
@pytest.mark.filterwarnings("ignore:secondorder")
def test_trials_leave_buffers_as_the_first_call_does(cls):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()
    optimizer, (x, y) = cls(model, nn.MSELoss()), data()
    mean = torch.zeros(6).double()

    def closure():
        optimizer.zero_grad()
        loss = optimizer.criterion(model(x), y)
        loss.backward()
        return loss

    for step in range(3):
        with torch.no_grad():
            mean = 0.9 * mean + 0.1 * model[0](x).mean(0)
        optimizer.step(closure)
        torch.testing.assert_close(model[1].running_mean, mean)
        assert model[1].num_batches_tracked == step + 1
