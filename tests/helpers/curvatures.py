"""Nets and criteria whose curvature is compared with oracles; the blocks that the tape gives, and those of Jacobians."""

import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

from secondorder._layers import linear_layers
from secondorder._tape import Tape
from secondorder.criteria import BoundedClassificationLoss, TukeyBiweightLoss


def network(widths, activation, bias=True):
    layers = []
    for n_in, n_out in zip(widths, widths[1:]):
        layers += [nn.Linear(n_in, n_out, bias=bias), activation]
    return nn.Sequential(*layers[:-1]).double()


CRITERIA = {
    "cross-entropy": (nn.CrossEntropyLoss(), lambda m, k: torch.randint(k, (m,))),
    "mse": (nn.MSELoss(), lambda m, k: torch.randn(m, k).double()),
    "bce": (nn.BCEWithLogitsLoss(), lambda m, k: torch.rand(m, k).double()),
    "eq14": (BoundedClassificationLoss(), lambda m, k: torch.randint(k, (m,))),
    "tukey": (TukeyBiweightLoss(c=1.0), lambda m, k: torch.randn(m, k).double()),
    "huber": (nn.HuberLoss(delta=0.3), lambda m, k: torch.randn(m, k).double()),
}


def log_odds(output):
    """Of label 1 in a mixture of two binary classifiers (Botev et al., Eq. 27), for logits [m, 3]."""
    gate, first, second = output.unbind(1)
    yes, no = (
        torch.logaddexp(F.logsigmoid(gate) + F.logsigmoid(sign * first), F.logsigmoid(-gate) + F.logsigmoid(sign * second))
        for sign in (1, -1)
    )
    return yes - no


class Branching(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.norm, self.kind = nn.LayerNorm(5), kind

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if self.kind == "norm":
            return self.c(torch.tanh(self.norm(self.b(h))))
        if self.kind == "softmax":
            return self.c(torch.tanh(self.b(h)).softmax(-1))
        if self.kind == "residual":
            return self.c(h + torch.tanh(self.b(h)))
        if self.kind == "heads":
            return torch.cat([self.b(h)[:, :2], self.c(h)[:, :1]], -1)
        return self.c(torch.tanh(self.b(h)).flip(0))  # mixes instances


def blocks(model, criterion, curvature, *batches, scale=1.0, samples=None):
    """{layer name: H} of a curvature after backward passes over the batches."""
    layers = linear_layers(model)
    tape = Tape(layers, criterion, curvature.tape_options(samples=samples))
    for x, y in batches:
        (scale * criterion(model(x), y)).backward()
    hessians = curvature.bias_hessians(tape.records())
    tape.remove()
    return {layers[layer]: h for layer, h in hessians.items()}


def gauss_newton_blocks(model, criterion, x, y):
    """sum_i J_i^T H_i J_i / m for every bias, J_i the output's Jacobian and H_i the criterion's Hessian for instance i alone."""
    fixed = {n: p.detach() for n, p in model.named_parameters()}
    result = {}
    for name in linear_layers(model).values():
        key, total = f"{name}.bias", 0
        for i in range(len(x)):
            output = lambda b, i=i, key=key: functional_call(model, {**fixed, key: b}, (x[i : i + 1],)).flatten()  # noqa: E731
            jacobian, shape = jacrev(output)(fixed[key]), model(x[i : i + 1]).shape
            top = hessian(lambda z, i=i, shape=shape: criterion(z.view(shape), y[i : i + 1]))(output(fixed[key]))
            total = total + jacobian.T @ top @ jacobian / len(x)
        result[name] = total
    return result


def assert_blocks(actual, expected):
    assert actual.keys() == expected.keys()
    for name, block in expected.items():
        torch.testing.assert_close(actual[name], block, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def instance_gradients(model, criterion, x, y):
    """Every instance's own gradient w.r.t. every bias."""
    names = list(linear_layers(model).values())
    rows = {name: [] for name in names}
    for i in range(len(x)):
        gradients = torch.autograd.grad(
            criterion(model(x[i : i + 1]), y[i : i + 1]), [model.get_parameter(f"{n}.bias") for n in names]
        )
        for name, gradient in zip(names, gradients, strict=True):
            rows[name].append(gradient)
    return {name: torch.stack(gradients) for name, gradients in rows.items()}


class Doubled(torch.autograd.Function):
    """2 x, whose second derivative is not to be had."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad
