"""Nets with a structure of their own: experts, adapters, a learnt differential equation, sets, factors of a matrix."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.experiments.everyday.densities import mlp
from bench.experiments.everyday.images import classifier
from bench.experiments.everyday.script import Script, accuracy, evaluation, task
from bench.experiments.harness import Task, batches
from bench.shipped import small_digits


class Experts(nn.Module):
    """Four experts, of which a gate chooses one for each instance; and how evenly it does."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 4)
        self.experts = nn.ModuleList(mlp(64, 32, 10, activation=nn.GELU) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shares = self.gate(x).softmax(1)
        share, chosen = shares.max(1)
        # Every expert sees something, so that every parameter has a gradient.
        output = sum((share * (chosen == k))[:, None] * expert(x) for k, expert in enumerate(self.experts))
        return output, 4 * (shares.mean(0) * F.one_hot(chosen, 4).float().mean(0)).sum()


def experts(seed: int) -> Task:
    data, model, criterion = small_digits(), Experts(), nn.CrossEntropyLoss()
    x, y, test_x = data.train_x.flatten(1), data.train_y, data.test_x.flatten(1)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        output, unevenness = model(x)
        return criterion(output, y) + 0.01 * unevenness

    def measure() -> tuple[Tensor, Tensor]:
        return loss(x, y), accuracy(model(test_x)[0], data.test_y)

    return task(data.name, model, (x, y), 64, seed, loss, measure, criterion)


class Adapted(nn.Module):
    """A frozen layer, and a matrix of rank 4 beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.frozen = (layer.weight.detach(), layer.bias.detach())
        self.down = nn.Parameter(torch.randn(4, layer.in_features) / math.sqrt(layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.frozen) + x @ self.down.T @ self.up.T


def adapters(seed: int) -> Task:
    """A net that knows digits upside down learns to read them the right way up."""
    data, base = small_digits(), mlp(64, 128, 128, 10, activation=nn.ReLU)
    optimizer = torch.optim.Adam(base.parameters(), 3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(base(data.train_x.flip(2).flatten(1)), data.train_y).backward()
        optimizer.step()
    layers = [Adapted(layer) if isinstance(layer, nn.Linear) else layer for layer in base]
    return classifier(nn.Sequential(nn.Flatten(), *layers), 64, seed)


def neural_ode(seed: int) -> Task:
    """The right side of an equation from its solutions, by 20 steps of Runge and Kutta's method."""

    def solved(slope, y: Tensor, h: float = 0.1) -> Tensor:
        path = []
        for _ in range(20):
            a = slope(y)
            b = slope(y + h / 2 * a)
            c = slope(y + h / 2 * b)
            y = y + h / 6 * (a + 2 * b + 2 * c + slope(y + h * c))
            path.append(y)
        return torch.stack(path, 1)

    start = 2 * torch.rand(250, 2, generator=torch.Generator().manual_seed(0)) - 1
    matrix = torch.tensor([[-0.1, -2.0], [2.0, -0.1]])
    paths = solved(lambda y: y**3 @ matrix, start)
    model, criterion = mlp(2, 50, 2), nn.L1Loss()

    def loss(start: Tensor, path: Tensor) -> Tensor:
        return criterion(solved(model, start), path)

    train, test = (start[:200], paths[:200]), (start[200:], paths[200:])
    measure = lambda: (loss(*train), loss(*test))
    return task("250 paths of a cubic equation", model, train, 20, seed, loss, measure, criterion)


class Set(nn.Module):
    """A function of a set of numbers [m, 10, 1]: a net on each, their mean, a net on that."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.all = mlp(1, 64, 64, 64, activation=nn.ReLU), mlp(64, 64, 1, activation=nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        return self.all(self.each(x).relu().mean(1))


def sets(seed: int) -> Task:
    x = torch.rand(2400, 10, 1, generator=torch.Generator().manual_seed(0))
    y, model, criterion = x.amax(1) + x.std(1), Set(), nn.MSELoss()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return criterion(model(x), y)

    train, test = (x[:2000], y[:2000]), (x[2000:], y[2000:])
    measure = lambda: (loss(*train), loss(*test))
    return task("2,400 sets of ten numbers", model, train, 64, seed, loss, measure, criterion)


class Factors(nn.Module):
    """Ratings of a user and a thing: the product of two vectors, and a number for each."""

    def __init__(self, users: int, things: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(*shape) for shape in ((users, 8), (things, 8), (users, 1), (things, 1)))
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, user: Tensor, thing: Tensor) -> Tensor:
        u, v, b, c = (table(codes) for table, codes in zip(self.tables, (user, thing, user, thing)))
        return (u * v).sum(1) + b.squeeze(1) + c.squeeze(1)


def factorization(seed: int) -> Task:
    generator = torch.Generator().manual_seed(0)
    users, things = torch.randn(300, 5, generator=generator), torch.randn(200, 5, generator=generator)
    user, thing = (torch.randint(n, (10_000,), generator=generator) for n in (300, 200))
    rating = (users[user] * things[thing]).sum(1) + 0.1 * torch.randn(10_000, generator=generator)
    model, criterion = Factors(300, 200), nn.MSELoss()

    def loss(user: Tensor, thing: Tensor, rating: Tensor) -> Tensor:
        return criterion(model(user, thing), rating)

    train, test = ([t[part] for t in (user, thing, rating)] for part in (slice(8000), slice(8000, None)))
    return Task(
        "10,000 drawn ratings", model, batches(tuple(train), 256, seed), lambda rows: loss(*rows),
        evaluation(model, lambda: (loss(*train), loss(*test))), 8000 / 256, criterion,
    )  # fmt: skip


SCRIPTS = [
    Script(
        "mixture of experts", "four of 64-32-10, GELU, and a gate, batch 64", experts,
        seconds=4, score_name="test accuracy, %", higher=True,
    ),
    Script(
        "adapters", "rank 4 beside a frozen 64-128-128-10, batch 64", adapters,
        seconds=4, score_name="test accuracy, %", higher=True,
    ),
    Script("neural ODE", "2-50-2, tanh, 20 steps, absolute error, batch 20", neural_ode, seconds=5, score_name="test loss"),
    Script("sets", "1-64-64-64 and 64-64-1, ReLU, MSELoss, batch 64", sets, seconds=4, score_name="test loss"),
    Script(
        "matrix factorization", "four embeddings, 300 and 200 rows, MSELoss, batch 256", factorization,
        seconds=3, score_name="test loss",
    ),
]  # fmt: skip
