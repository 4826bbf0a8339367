"""The Jacobian of an equation's residuals, and a step of LevenbergMarquardt, against one gradient of the same loss."""

from collections.abc import Callable
from functools import partial
from math import pi

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, vmap

import secondorder as so
from bench.timing import interleaved, report
from secondorder._tape.factored import Buffer, Jacobian
from secondorder._tape.jacobian import jacobian
from secondorder._tape.plans import make_plan
from secondorder._tape.residuals import Reach, coefficients, find_terms
from secondorder._tape.uses import find_uses

DRAWN = 300


def poisson() -> tuple[nn.Module, Callable[[], Tensor], Tensor, Tensor]:
    """A net 2-32-32-32-1, the loss of Poisson's equation at 800 points inside and 200 on the edge, and these points."""
    torch.manual_seed(0)
    widths = [2, 32, 32, 32, 1]
    layers = [layer for n_in, n_out in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(n_in, n_out), nn.Tanh())]
    net = nn.Sequential(*layers[:-1]).double()
    x, edge = torch.rand(800, 2).double().requires_grad_(), torch.rand(200, 2).double()
    edge[:100, 0], edge[100:, 1] = edge[:100, 0].round(), edge[100:, 1].round()

    def loss() -> Tensor:
        u_x = torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]
        laplacian = sum(torch.autograd.grad(u_x[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2))
        return ((laplacian - source(x)) ** 2).mean() + 25 * (net(edge) ** 2).mean()

    return net, loss, x, edge


def source(x: Tensor) -> Tensor:
    """The equation's right-hand side."""
    return -5 * pi**2 * torch.sin(pi * x[..., 0]) * torch.sin(2 * pi * x[..., 1])


def by_uses(parameters: list[Tensor], loss: Callable[[], Tensor], drawn: int | None) -> Callable[[], Jacobian]:
    """The loss and its residuals' Jacobian, as LevenbergMarquardt has them; of so many rows, or of all."""
    index = {id(p): i for i, p in enumerate(parameters)}
    buffer, plans = Buffer(), []

    def compute() -> Jacobian:
        value = loss()
        terms = find_terms(value, Reach(parameters), "bench").squares
        weights = coefficients(value, terms, "bench")
        residuals = [term.residual for term in terms]
        uses = [find_uses(r, index) for r in residuals]
        if not plans:
            plans.append(make_plan(residuals, uses, parameters))
        blocks = plans[0].blocks
        total = sum(block.size for block in blocks)
        rows = [None if drawn is None else torch.arange(drawn * block.size // total) for block in blocks]
        scales = [weights[b.term].flatten()[b.chosen(d, value.device)].sqrt() for b, d in zip(blocks, rows, strict=True)]
        found = jacobian(plans[0], residuals, uses, parameters, scales, rows, buffer)
        found.dense()
        return found

    return compute


def by_func(net: nn.Module, x: Tensor, edge: Tensor) -> None:
    """The same rows by torch.func, for which the equation is written anew for one point."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def u(parameters: dict[str, Tensor], point: Tensor) -> Tensor:
        return functional_call(net, parameters, (point.unsqueeze(0),)).squeeze()

    def residual(parameters: dict[str, Tensor], point: Tensor) -> Tensor:
        h = hessian(partial(u, parameters))(point)
        return h[0, 0] + h[1, 1] - source(point)

    for function, points in ((residual, x.detach()), (u, edge)):
        vmap(grad(function), in_dims=(None, 0))(parameters, points)


def main() -> None:
    net, loss, x, edge = poisson()
    parameters: list[Tensor] = list(net.parameters())
    optimizer = so.LevenbergMarquardt(net.parameters(), race=False, rows=DRAWN, max_rows=DRAWN)
    optimizer.param_groups[0]["lr"] = 1e-9  # every step is then at the same point
    functions = {
        "loss and gradient": lambda: torch.autograd.grad(loss(), parameters),
        "loss": loss,
        f"loss and J, {DRAWN} rows": by_uses(parameters, loss, DRAWN),
        "loss and J, 1,000 rows": by_uses(parameters, loss, None),
        "J by torch.func, 1,000 rows": lambda: by_func(net, x, edge),
        f"a step, {DRAWN} rows": lambda: optimizer.step(loss),
    }
    measured = interleaved(functions, "loss and gradient", 9)
    report(
        "least_squares",
        f"Poisson's equation, 2-32-32-32-1, float64, {torch.get_num_threads()} threads",
        measured,
        "Ratio: to loss and gradient, median over rounds. A step calls the closure at least three times.",
    )


if __name__ == "__main__":
    main()
