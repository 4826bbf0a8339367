"""Every problem of the experiments."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import data
from bench.data import Dataset
from bench.experiments.harness import Supervised
from secondorder.criteria import BoundedClassificationLoss, CompositeLoss, TukeyBiweightLoss


def network(widths: list[int], activation: type[nn.Module], linear_code: bool = False) -> nn.Sequential:
    """Linear layers with the activation between them, with Xavier's initialisation for sigmoids.

    linear_code: the narrowest layer has none.
    """
    modules: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        modules.append(nn.Linear(n_in, n_out))
        if activation is nn.Sigmoid:
            nn.init.xavier_uniform_(modules[-1].weight)
            nn.init.zeros_(modules[-1].bias)
        if not (linear_code and n_out == min(widths)):
            modules.append(activation())
    return nn.Sequential(*modules[:-1])


def log_odds(output: Tensor) -> Tensor:
    """Of label 1 in KFRA's mixture of two binary classifiers (Botev et al., Eq. 27), [m], for logits [m, 3]."""
    gate, first, second = output.unbind(1)
    yes, no = (
        torch.logaddexp(F.logsigmoid(gate) + F.logsigmoid(sign * first), F.logsigmoid(-gate) + F.logsigmoid(sign * second))
        for sign in (1, -1)
    )
    return yes - no


def accuracy(output: Tensor, target: Tensor) -> float:
    return 100 * (output.argmax(1) == target).float().mean().item()


def squared_error(output: Tensor, target: Tensor, binary: bool) -> float:
    """Per image, as all three papers measure what an autoencoder reconstructs."""
    return F.mse_loss(output.sigmoid() if binary else output, target, reduction="sum").item() / len(target)


def mixture_accuracy(output: Tensor, target: Tensor) -> float:
    return 100 * ((log_odds(output) > 0) == (target > 0.5)).float().mean().item()


def first_images(load: Callable[[Path], Dataset], n: int, data_dir: Path | None, themselves: bool = False) -> Dataset:
    """The first n images to train on; `themselves`: as their own targets."""
    if data_dir is None:
        raise FileNotFoundError("expected --data-dir: this experiment reads files; see bench/data.py for what goes where")
    whole = load(data_dir)
    train_x, test_x = whole.train_x[:n], whole.test_x
    name = f"{whole.name}, {len(train_x):,} to train on"
    return Dataset(name, train_x, train_x if themselves else whole.train_y[:n], test_x, test_x if themselves else whole.test_y)


def _autoencoder(
    name: str, load: Callable[[Path | None], Dataset], pixels: int, binary: bool, hidden: tuple[int, ...] = (256, 128, 64)
) -> Supervised:
    widths = [pixels, *hidden, 30, *reversed(hidden), pixels]
    return Supervised(
        name,
        f"{'-'.join(map(str, widths))}, ReLU, linear code, {'cross-entropy' if binary else 'squared error'} per image",
        load,
        partial(network, widths, nn.ReLU, linear_code=True),
        partial(nn.BCEWithLogitsLoss if binary else nn.MSELoss, reduction="sum"),
        batch=500,
        seconds=8,
        score=partial(squared_error, binary=binary),
        score_name="test squared error per image",
        log_score=True,
        summed=True,
    )


AUTOENCODERS = [
    _autoencoder("CURVES", lambda _: data.curves(10_000, 5000), 784, binary=True),
    _autoencoder(
        "FACES", lambda d: first_images(partial(data.faces, per_image=40), 10_000, d, themselves=True), 625, binary=False
    ),
    _autoencoder("MNIST", lambda d: first_images(data.mnist, 10_000, d, themselves=True), 784, binary=True),
]


def _even_digits(data_dir: Path | None) -> Dataset:
    digits = first_images(data.mnist, 10_000, data_dir)
    even = [(y % 2 == 0).float() for y in (digits.train_y, digits.test_y)]
    return Dataset(digits.name, digits.train_x, even[0], digits.test_x, even[1])


MIXTURE = Supervised(
    "even or odd",
    "784-256-128-64-30-3, ReLU, mixture of two binary classifiers (Eq. 27)",
    _even_digits,
    partial(network, [784, 256, 128, 64, 30, 3], nn.ReLU),
    lambda: CompositeLoss(log_odds, nn.BCEWithLogitsLoss()),
    batch=500,
    seconds=5,
    score=mixture_accuracy,
    score_name="test accuracy, %",
    higher=True,
)

CIFAR_WIDTHS = [3072, 1024, 512, 256, 128, 64, 32, 16, 10]  # of Chen et al.


def cifar10(data_dir: Path | None, images: int = 10_000) -> Dataset:
    return first_images(data.cifar10, images, data_dir)


def _resized_cifar10(data_dir: Path | None, images: int, side: int) -> Dataset:
    """CIFAR-10 of side x side pixels; at 16 each is the mean of four."""
    original = cifar10(data_dir, images)
    train, test = (
        F.interpolate(x.reshape(-1, 3, 32, 32), (side, side), mode="bilinear").flatten(1)
        for x in (original.train_x, original.test_x[:2000])
    )
    return Dataset(f"{original.name}, {side} x {side}", train, original.train_y, test, original.test_y[:2000])


def _classifier(name: str, load: Callable, widths: list[int], criterion: Callable[[], nn.Module], seconds: float) -> Supervised:
    return Supervised(
        name,
        f"{'-'.join(map(str, widths))}, sigmoid, Xavier",
        load,
        partial(network, widths, nn.Sigmoid),
        criterion,
        batch=100,
        seconds=seconds,
        score=accuracy,
        score_name="test accuracy, %",
        higher=True,
        log_loss=criterion is nn.CrossEntropyLoss,
    )


# The paper's net for CIFAR-10 at a quarter of its widths, inputs too, without its last two; and one with so many inputs, as for
# ImageNet-10, that their own n_in x n_in factor does not pay.
SMALL = [768, 256, 128, 64, 32, 10]
WIDE = [12288, 128, 64, 32, 10]
_small = partial(_resized_cifar10, images=10_000, side=16)
_wide = partial(_resized_cifar10, images=2500, side=64)
CLASSIFIERS = [
    _classifier("CIFAR-10, cross-entropy", _small, SMALL, nn.CrossEntropyLoss, 6),
    _classifier("CIFAR-10, Eq. 14", _small, SMALL, BoundedClassificationLoss, 6),
    _classifier("wide input, cross-entropy", _wide, WIDE, nn.CrossEntropyLoss, 6),
    _classifier("wide input, Eq. 14", _wide, WIDE, BoundedClassificationLoss, 6),
]


def _corrupted_digits(_: Path | None) -> Dataset:
    """scikit-learn's digits, a table of 64 columns; 40 % of the training labels are replaced by random ones."""
    from sklearn.datasets import load_digits

    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    x = x.float() / 16
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    x, y = x[order], y[order].long()
    train_y = y[:1300].clone()
    wrong = torch.rand(1300, generator=generator) < 0.4
    train_y[wrong] = torch.randint(10, (1300,), generator=generator)[wrong]
    return Dataset("digits 8x8 of scikit-learn, 40 % of the labels random", x[:1300], train_y, x[1300:], y[1300:])


def _corrupted_diabetes(_: Path | None) -> Dataset:
    """scikit-learn's diabetes, standardised; 30 % of the training targets are raised by 5 to 15 standard deviations."""
    from sklearn.datasets import load_diabetes

    x, y = (torch.as_tensor(a, dtype=torch.float32) for a in load_diabetes(return_X_y=True, scaled=True))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    x, y = x[order] / x.std(), ((y - y.mean()) / y.std())[order].unsqueeze(1)
    train_y = y[:300].clone()
    wrong = torch.rand(300, generator=generator) < 0.3
    train_y[wrong] += 5 + 10 * torch.rand(int(wrong.sum()), 1, generator=generator)
    return Dataset("diabetes of scikit-learn, 30 % of the targets corrupted", x[:300], train_y, x[300:], y[300:])


def mean_absolute_error(output: Tensor, target: Tensor) -> float:
    return F.l1_loss(output, target).item()


def _robust(
    name: str, load: Callable, widths: list[int], criterion: Callable[[], nn.Module], score: Callable, label: str
) -> Supervised:
    return Supervised(
        name, f"{'-'.join(map(str, widths))}, tanh", load, partial(network, widths, nn.Tanh), criterion, batch=100, seconds=2,
        score=score, score_name=label, higher=score is accuracy, log_loss=False,
    )  # fmt: skip


ROBUST = [
    _robust("labels, cross-entropy", _corrupted_digits, [64, 64, 32, 10], nn.CrossEntropyLoss, accuracy, "test accuracy, %"),
    _robust("labels, Eq. 14", _corrupted_digits, [64, 64, 32, 10], BoundedClassificationLoss, accuracy, "test accuracy, %"),
    _robust("targets, MSE", _corrupted_diabetes, [10, 32, 16, 1], nn.MSELoss, mean_absolute_error, "test absolute error in s.d."),
    _robust(
        "targets, Tukey",
        _corrupted_diabetes,
        [10, 32, 16, 1],
        TukeyBiweightLoss,
        mean_absolute_error,
        "test absolute error in s.d.",
    ),
]


class JetNet(nn.Module):
    """A tanh net whose output is u, its gradient and its pure second derivatives w.r.t. the 2 inputs, by forward mode.

    What a physics-informed net's criterion needs are then outputs like any other: [m, 5] of x [m, 2].
    """

    def __init__(self, widths: list[int]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        # Rows: value, d/dx, d/dy, d2/dx2, d2/dy2 [m, 5, n].
        unit = torch.eye(2, dtype=x.dtype, device=x.device).expand(len(x), 2, 2)
        jet = torch.cat([x.unsqueeze(1), unit, torch.zeros_like(unit)], 1)
        for i, layer in enumerate(self.layers):
            z = layer(jet)
            value, first, second = z[:, :1], z[:, 1:3] - layer.bias, z[:, 3:] - layer.bias  # derivatives have no bias
            if i + 1 < len(self.layers):
                h = torch.tanh(value)
                d1 = 1 - h * h
                value, first, second = h, d1 * first, d1 * second - 2 * h * d1 * first * first
            jet = torch.cat([value, first, second], 1)
        return jet.squeeze(2)


class PoissonLoss(nn.Module):
    """Mean of (u_xx + u_yy - f)^2 inside and of 100 u^2 on the boundary; targets [m, 3] are f, 1 inside, and the solution."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        f, inside, _ = target.unbind(1)
        residual = output[:, 3] + output[:, 4] - f
        return (inside * residual**2 + (1 - inside) * 100 * output[:, 0] ** 2).mean()


def _poisson(_: Path | None) -> Dataset:
    """u = sin(pi x) sin(2 pi y) on the unit square: 800 points inside and 200 on the boundary; 1,000 inside test."""
    generator = torch.Generator().manual_seed(0)
    inside, test = torch.rand(800, 2, generator=generator), torch.rand(1000, 2, generator=generator)
    edge = torch.rand(200, 2, generator=generator)
    edge[:100, 0] = (edge[:100, 0] > 0.5).float()
    edge[100:, 1] = (edge[100:, 1] > 0.5).float()

    def target(x: Tensor, within: float) -> Tensor:
        u = (math.pi * x[:, 0]).sin() * (2 * math.pi * x[:, 1]).sin()
        return torch.stack([-5 * math.pi**2 * u, torch.full_like(u, within), u], 1)

    x, y = torch.cat([inside, edge]), torch.cat([target(inside, 1), target(edge, 0)])
    return Dataset("Poisson's equation, 1,000 points", x, y, test, target(test, 1))


def relative_error(output: Tensor, target: Tensor) -> float:
    """|u - solution| / |solution|."""
    return ((output[:, 0] - target[:, 2]).norm() / target[:, 2].norm()).item()


PINN = Supervised(
    "Poisson", "2-32-32-32-1, tanh, on the unit square", _poisson, partial(JetNet, [2, 32, 32, 32, 1]), PoissonLoss,
    batch=1000, seconds=6, score=relative_error, score_name="relative L2 error", log_score=True,
)  # fmt: skip

# At the published sizes and batches, on whole training sets: Chen et al.'s net for CIFAR-10, Goldfarb et al.'s for MNIST.
PUBLISHED = [
    replace(problem, seconds=600, batch=1000)
    for problem in (
        _classifier("CIFAR-10, published size", partial(cifar10, images=50_000), CIFAR_WIDTHS, nn.CrossEntropyLoss, 0),
        _autoencoder(
            "MNIST, published size", lambda d: first_images(data.mnist, 60_000, d, themselves=True), 784, True, (1000, 500, 250)
        ),
    )
]

DIGITS = _classifier("digits", lambda _: data.digits(), [784, 256, 128, 64, 32, 10], nn.CrossEntropyLoss, 6)
FASHION = _classifier(
    "Fashion-MNIST", lambda d: first_images(data.fashion_mnist, 10_000, d), [784, 256, 128, 64, 32, 10], nn.CrossEntropyLoss, 6
)
DIGITS_500 = replace(DIGITS, name="digits, batches of 500", batch=500)
DIGITS_EPOCH = replace(DIGITS, name="digits, an epoch", seconds=120, epochs=1)
