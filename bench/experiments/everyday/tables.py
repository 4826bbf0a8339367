"""Tables: regression, embeddings of categories, quantiles, counts."""

import torch
from torch import Tensor, nn

from bench.experiments.everyday.script import Script, task
from bench.experiments.harness import EVALUATED, Task
from bench.shipped import affairs, diamonds, doctor_visits
from secondorder.criteria import FunctionCriterion


def regression(model: nn.Module, batch: int, seed: int) -> Task:
    """Squared error on the diamonds' log prices."""
    data, criterion = diamonds(), nn.MSELoss()
    x, y = data.train_x[:EVALUATED], data.train_y[:EVALUATED]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return criterion(model(x), y)

    def measure() -> tuple[Tensor, Tensor]:
        return loss(x, y), loss(data.test_x, data.test_y)

    return task(data.name, model, (data.train_x, data.train_y), batch, seed, loss, measure, criterion)


def normalized_regression(seed: int) -> Task:
    def block(n_in: int, n_out: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.ReLU(), nn.Dropout(0.1))

    return regression(nn.Sequential(block(26, 128), block(128, 64), nn.Linear(64, 1), nn.Flatten(0)), 256, seed)


def plain_regression(seed: int) -> Task:
    model = nn.Sequential(nn.Linear(26, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1), nn.Flatten(0))
    return regression(model, 256, seed)


class EmbeddedTable(nn.Module):
    """A vector for each category, beside the numbers."""

    def __init__(self, sizes: list[int], numbers: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, 4) for size in sizes)
        self.head = nn.Sequential(
            nn.Linear(4 * len(sizes) + numbers, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1)
        )

    def forward(self, codes: Tensor, numbers: Tensor) -> Tensor:
        vectors = [embedding(code) for embedding, code in zip(self.embeddings, codes.unbind(1))]
        return self.head(torch.cat([*vectors, numbers], 1)).squeeze(1)


def embeddings(seed: int) -> Task:
    train, test = affairs()
    model, criterion = EmbeddedTable(train.sizes, train.numbers.shape[1]), nn.BCEWithLogitsLoss()

    def loss(codes: Tensor, numbers: Tensor, target: Tensor) -> Tensor:
        return criterion(model(codes, numbers), target)

    def measure() -> tuple[Tensor, Tensor]:
        logits = model(test.codes, test.numbers)
        higher = logits[test.target == 1][:, None] > logits[test.target == 0]
        training = (train.codes[:EVALUATED], train.numbers[:EVALUATED], train.target[:EVALUATED])
        return loss(*training), 100 * higher.float().mean()

    tensors = (train.codes, train.numbers, train.target)
    return task("5,000 marriages of Fair's survey", model, tensors, 128, seed, loss, measure, criterion)


def quantiles(seed: int) -> Task:
    data = diamonds()
    levels = torch.tensor([0.05, 0.5, 0.95])
    model = nn.Sequential(nn.Linear(26, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))

    def pinball(output: Tensor, y: Tensor) -> Tensor:
        below = y[:, None] - output
        return torch.maximum(levels * below, (levels - 1) * below).mean()

    criterion = FunctionCriterion(pinball)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return criterion(model(x), y)

    def measure() -> tuple[Tensor, Tensor]:
        return loss(data.train_x[:EVALUATED], data.train_y[:EVALUATED]), loss(data.test_x, data.test_y)

    return task(data.name, model, (data.train_x, data.train_y), 256, seed, loss, measure, criterion)


def counts(seed: int) -> Task:
    data, criterion = doctor_visits(), nn.PoissonNLLLoss()
    model = nn.Sequential(nn.Linear(9, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(0))

    def deviance(x: Tensor, y: Tensor) -> Tensor:
        mean = model(x).exp()
        return 2 * (torch.xlogy(y, y / mean) - y + mean).mean()

    x, y = data.train_x[:EVALUATED], data.train_y[:EVALUATED]
    return task(
        data.name,
        model,
        (data.train_x, data.train_y),
        256,
        seed,
        lambda x, y: criterion(model(x), y),
        lambda: (criterion(model(x), y), deviance(data.test_x, data.test_y)),
        criterion,
    )


SCRIPTS = [
    Script(
        "diamonds, BatchNorm", "26-128-64-1, ReLU, BatchNorm, dropout, MSELoss, batch 256", normalized_regression,
        seconds=4, score_name="test squared error",
    ),
    Script("diamonds", "26-64-64-1, SiLU, MSELoss, batch 256", plain_regression, seconds=4, score_name="test squared error"),
    Script(
        "embeddings", "five embeddings and three numbers, 23-64-32-1, dropout, BCEWithLogitsLoss, batch 128", embeddings,
        seconds=3, score_name="test area under the ROC curve, %", higher=True,
    ),
    Script("quantiles", "26-64-64-3, ReLU, pinball loss, batch 256", quantiles, seconds=4, score_name="test loss"),
    Script(
        "counts", "9-64-32-1, ReLU, PoissonNLLLoss, batch 256", counts,
        seconds=3, score_name="test deviance", signed=True,
    ),
]  # fmt: skip
