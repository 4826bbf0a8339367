"""Images: classifiers, autoencoders, a teacher's knowledge, contrast."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.data import digits
from bench.experiments.everyday.script import Script, accuracy, task
from bench.experiments.harness import EVALUATED, Task
from bench.shipped import small_digits

mnist = lru_cache(digits)


class Classifier(nn.Module):
    """Log-probabilities of ten classes, as the first example of every tutorial has them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, 10)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.relu(self.fc1(x)))
        x = self.dropout(F.relu(self.fc2(x)))
        return F.log_softmax(self.fc3(x), dim=1)


def mnist_example(seed: int) -> Task:
    data, model, criterion = mnist(), Classifier(), nn.NLLLoss()
    x, y = data.train_x[:EVALUATED], data.train_y[:EVALUATED]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return criterion(model(x), y)

    def measure() -> tuple[Tensor, Tensor]:
        return loss(x, y), accuracy(model(data.test_x), data.test_y)

    return task(data.name, model, (data.train_x, data.train_y), 64, seed, loss, measure, criterion)


class VAE(nn.Module):
    """Two heads for the code's mean and the logarithm of its variance."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, 256), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(256, 16), nn.Linear(256, 16)
        self.decoder = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 784))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mean, log_variance = self.mean(h), self.log_variance(h)
        code = mean + torch.exp(log_variance / 2) * torch.randn_like(mean)
        return self.decoder(code), mean, log_variance


def vae(seed: int) -> Task:
    data, model, criterion = mnist(), VAE(), nn.BCEWithLogitsLoss(reduction="sum")

    def loss(x: Tensor) -> Tensor:
        logits, mean, log_variance = model(x)
        reconstruction = criterion(logits, x)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2
        return (reconstruction + divergence) / len(x)

    def measure() -> tuple[Tensor, Tensor]:
        return loss(data.train_x[:EVALUATED]), loss(data.test_x)

    return task(data.name, model, (data.train_x,), 128, seed, loss, measure, criterion)


def denoising_autoencoder(seed: int) -> Task:
    data = mnist()
    model = nn.Sequential(
        nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(),
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 784), nn.Sigmoid(),
    )  # fmt: skip
    criterion = nn.MSELoss()

    def loss(x: Tensor) -> Tensor:
        return criterion(model((x + 0.4 * torch.randn_like(x)).clamp(0, 1)), x)

    def measure() -> tuple[Tensor, Tensor]:
        return loss(data.train_x[:EVALUATED]), 784 * loss(data.test_x)

    return task(data.name, model, (data.train_x,), 100, seed, loss, measure, criterion)


def classifier(model: nn.Module, batch: int, seed: int) -> Task:
    """Cross-entropy on the small digits."""
    data, criterion = small_digits(), nn.CrossEntropyLoss()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return criterion(model(x), y)

    def measure() -> tuple[Tensor, Tensor]:
        return loss(data.train_x, data.train_y), accuracy(model(data.test_x), data.test_y)

    return task(data.name, model, (data.train_x, data.train_y), batch, seed, loss, measure, criterion)


def convolutions(seed: int) -> Task:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Dropout(0.25), nn.Linear(64, 10),
    )  # fmt: skip
    return classifier(model, 64, seed)


@lru_cache
def teacher() -> Tensor:
    """A larger net's logits of the training images."""
    data = mnist()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 200), nn.ReLU(), nn.Linear(200, 10))
        optimizer = torch.optim.Adam(net.parameters())
        for _ in range(8):
            for rows in torch.randperm(len(data.train_x)).split(100):
                optimizer.zero_grad()
                F.cross_entropy(net(data.train_x[rows]), data.train_y[rows]).backward()
                optimizer.step()
    return net(data.train_x).detach()


def distillation(seed: int, temperature: float = 3.0) -> Task:
    data, logits = mnist(), teacher()
    model = nn.Sequential(nn.Linear(784, 48), nn.ReLU(), nn.Linear(48, 10))
    hard, soft = nn.CrossEntropyLoss(), nn.KLDivLoss(reduction="batchmean")

    def loss(x: Tensor, y: Tensor, wanted: Tensor) -> Tensor:
        output = model(x)
        imitation = soft(F.log_softmax(output / temperature, 1), F.softmax(wanted / temperature, 1))
        return 0.5 * hard(output, y) + 0.5 * temperature**2 * imitation

    def measure() -> tuple[Tensor, Tensor]:
        training = (data.train_x[:EVALUATED], data.train_y[:EVALUATED], logits[:EVALUATED])
        return loss(*training), accuracy(model(data.test_x), data.test_y)

    return task(data.name, model, (data.train_x, data.train_y, logits), 128, seed, loss, measure, hard)


def view(x: Tensor) -> Tensor:
    """Images shifted by up to a pixel, each with noise of its own."""
    side, rows = x.shape[-1], torch.arange(len(x))
    padded = F.pad(x, (1, 1, 1, 1))
    windows = padded.unfold(2, side, 1).unfold(3, side, 1)  # [m, 1, 3, 3, side, side]
    shifted = windows[rows, :, torch.randint(3, (len(x),)), torch.randint(3, (len(x),))]
    return shifted + 0.2 * torch.randn_like(shifted)


def contrast(seed: int) -> Task:
    data = small_digits()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 32))
    criterion = nn.CrossEntropyLoss()

    def embed(x: Tensor) -> Tensor:
        return F.normalize(model(x), dim=1)

    def loss(x: Tensor) -> Tensor:
        first, second = embed(view(x)), embed(view(x))
        similarity = first @ second.T / 0.1
        same = torch.arange(len(x))
        return (criterion(similarity, same) + criterion(similarity.T, same)) / 2

    def measure() -> tuple[Tensor, Tensor]:
        nearest = (embed(data.test_x) @ embed(data.train_x).T).argmax(1)
        return loss(data.train_x[:512]), 100 * (data.train_y[nearest] == data.test_y).float().mean()

    return task(data.name, model, (data.train_x,), 256, seed, loss, measure, criterion)


SCRIPTS = [
    Script(
        "MNIST example", "784-300-100-10, ReLU, dropout, log_softmax and NLLLoss, batch 64", mnist_example,
        seconds=4, score_name="test accuracy, %", higher=True,
    ),
    Script("VAE", "784-256-16 and back, batch 128", vae, seconds=5, score_name="test loss"),
    Script(
        "denoising autoencoder", "784-256-64-256-784, sigmoid outputs, MSELoss, batch 100", denoising_autoencoder,
        seconds=5, score_name="test squared error per image",
    ),
    Script(
        "convolutions", "two convolutions, 512-64-10, dropout, batch 64", convolutions,
        seconds=4, score_name="test accuracy, %", higher=True,
    ),
    Script(
        "distillation", "784-48-10, labels and a teacher's logits, batch 128", distillation,
        seconds=4, score_name="test accuracy, %", higher=True,
    ),
    Script(
        "InfoNCE", "64-128-128-32, two views of each image, batch 256", contrast,
        seconds=4, score_name="nearest neighbour's test accuracy, %", higher=True,
    ),
]  # fmt: skip
