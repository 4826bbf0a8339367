"""Physics-informed nets and fits whose accuracy counts: how small the error of the solution is after seconds of one core.

An equation's residual at points, its initial and boundary values, each a mean square with a weight; derivatives by
`torch.autograd.grad(..., create_graph=True)`. All in float64.
"""

from bench.experiments.physics import evolution, fits, ordinary, stationary

PROBLEMS = [*stationary.PROBLEMS, *evolution.PROBLEMS, *ordinary.PROBLEMS, *fits.PROBLEMS]
