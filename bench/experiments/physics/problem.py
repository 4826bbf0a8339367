"""What a net is trained to be: the solution of an equation, or a function known at points."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.experiments.harness import Problem, Task

Function = Callable[[Tensor], Tensor]  # of points [n, d], with values [n, k]


@dataclass(frozen=True)
class Equation:
    """A loss that is zero for the solution, and the solution."""

    data: str  # the name of the points
    loss: Callable[[Any], Tensor]  # of a function, a sum of mean squares at points that stay
    points: Tensor  # where the error is measured
    solution: Tensor  # there
    _: KW_ONLY
    exact: Function | None = None  # the solution as a function, where there is a formula
    coefficient: float | None = None  # that of the equation where it is unknown: the function has it as an attribute
    examples: tuple[Tensor, Tensor] | None = None  # of a regression


@dataclass(frozen=True, eq=False)
class Physics(Problem):
    """An equation for a net, in float64, all of its points in every step; a seed decides the net alone."""

    equation: Callable[[], Equation]
    model: Callable[[], nn.Module]
    _: KW_ONLY
    seconds: float = 6
    score_name: str = "relative L2 error"
    evaluations: int = 60

    def begin(self, data_dir: Path | None, seed: int) -> Task:
        model, equation = self.model().double(), self.equation()

        def evaluate() -> tuple[float, float]:
            loss = equation.loss(model).item()
            with torch.no_grad():
                return loss, relative_error(model(equation.points), equation.solution)

        def more() -> dict[str, float]:
            if equation.coefficient is None:
                return {}
            return {"coefficient": abs(model.coefficient.item() / equation.coefficient - 1)}

        return Task(
            equation.data, model, repeat(None), lambda _: equation.loss(model), evaluate, 1.0, criterion=nn.MSELoss(), more=more
        )


def relative_error(value: Tensor, solution: Tensor) -> float:
    """|u - solution| / |solution|."""
    return ((value - solution).norm() / solution.norm()).item()


def net(*widths: int) -> nn.Sequential:
    """Linear layers as PyTorch initialises them, with tanh in between."""
    modules: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        modules += [nn.Linear(n_in, n_out), nn.Tanh()]
    return nn.Sequential(*modules[:-1])


def shape(*widths: int) -> str:
    return "-".join(map(str, widths))


def gradient(u: Tensor, x: Tensor) -> Tensor:
    """Every point's du/dx [n, d] of u [n, 1]."""
    return torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)[0]


def partials(u: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """The columns of `gradient`, [n, 1] each."""
    return gradient(u, x).split(1, dim=1)


def laplacian(u: Tensor, x: Tensor) -> Tensor:
    """The sum of the second derivatives [n, 1]."""
    return sum(partials(slope, x)[i] for i, slope in enumerate(partials(u, x)))


class Points:
    """Random points of a box."""

    def __init__(self, low: Sequence[float], high: Sequence[float]) -> None:
        self.low, self.high = (torch.tensor(bound, dtype=torch.float64) for bound in (low, high))
        self.generator = torch.Generator().manual_seed(0)

    def inside(self, n: int) -> Tensor:
        share = torch.rand(n, len(self.low), generator=self.generator, dtype=torch.float64)
        return self.low + share * (self.high - self.low)

    def at(self, n: int, coordinate: int, value: float) -> Tensor:
        """Points with this coordinate."""
        points = self.inside(n)
        points[:, coordinate] = value
        return points

    def faces(self, n: int, coordinates: Sequence[int] | None = None) -> Tensor:
        """Points with one coordinate, of these in turn, at either end."""
        points, chosen = self.inside(n), list(coordinates or range(len(self.low)))
        for row in range(n):
            i = chosen[row % len(chosen)]
            end = torch.rand((), generator=self.generator) < 0.5
            points[row, i] = (self.low if end else self.high)[i]
        return points
