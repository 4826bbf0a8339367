"""Real data that packages ship: tables, small digits, photographs. Each comes shuffled in a fixed order."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.data import Dataset


@dataclass(frozen=True)
class Categories:
    """A table of codes [n, columns] and numbers [n, columns] with a target [n], and how many codes each column has."""

    codes: Tensor
    numbers: Tensor
    target: Tensor
    sizes: list[int]


def _standardized(x: np.ndarray) -> Tensor:
    return torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)


@lru_cache
def small_digits() -> Dataset:
    """scikit-learn's 1,797 digits of 8 x 8 pixels [n, 1, 8, 8] in [0, 1]: 1,400 to train on."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16
    y = torch.tensor(labels, dtype=torch.int64)[order]
    return Dataset("1,797 digits of scikit-learn", x[:1400], y[:1400], x[1400:], y[1400:])


@lru_cache
def diamonds() -> Dataset:
    """Prices of diamonds: 6 numbers and 20 indicators of cut, colour and clarity [n, 26]; log price, standardised [n].

    20,000 of the 53,940 to train on, 4,000 to test.
    """
    import pandas as pd
    from plotnine.data import diamonds as table

    chosen = table.sample(24_000, random_state=0)
    x = _standardized(pd.get_dummies(chosen.drop(columns="price")).to_numpy(float))
    y = _standardized(np.log(chosen["price"].to_numpy(float)))
    return Dataset("20,000 diamonds of plotnine", x[:20_000], y[:20_000], x[20_000:], y[20_000:])


@lru_cache
def affairs() -> tuple[Categories, Categories]:
    """Fair's survey of 6,366 marriages: whether there was an affair. 5,000 to train on, the others to test."""
    from statsmodels.datasets import fair

    table = fair.load_pandas().data.sample(frac=1, random_state=0)
    names = ["rate_marriage", "religious", "educ", "occupation", "occupation_husb"]
    codes = torch.stack([torch.tensor(np.unique(table[name], return_inverse=True)[1]) for name in names], 1)
    numbers = _standardized(table[["age", "yrs_married", "children"]].to_numpy(float))
    target = torch.tensor((table["affairs"] > 0).to_numpy(), dtype=torch.float32)
    sizes = (codes.amax(0) + 1).tolist()
    train, test = (Categories(codes[rows], numbers[rows], target[rows], sizes) for rows in (slice(5000), slice(5000, None)))
    return train, test


@lru_cache
def doctor_visits() -> Dataset:
    """RAND's health insurance experiment: 9 columns [n, 9] and the number of visits to a doctor [n].

    16,000 of 20,190 to train on.
    """
    from statsmodels.datasets import randhie

    table = randhie.load_pandas().data.sample(frac=1, random_state=0)
    x = _standardized(table.drop(columns="mdvis").to_numpy(float))
    y = torch.tensor(table["mdvis"].to_numpy(float), dtype=torch.float32)
    return Dataset("16,000 visitors of RAND's experiment", x[:16_000], y[:16_000], x[16_000:], y[16_000:])


@lru_cache
def photograph(side: int) -> Dataset:
    """The middle of a photograph of scikit-learn's, grey: coordinates in [-1, 1] [n, 2] to brightness in [-1, 1] [n, 1].

    Every second pixel of side x side trains, in a chessboard's pattern; the others test.
    """
    from sklearn.datasets import load_sample_image

    grey = torch.tensor(load_sample_image("flower.jpg").copy(), dtype=torch.float32).mean(2)[:400, 120:520]
    pixels = F.interpolate(grey[None, None], size=(side, side), mode="area").reshape(-1, 1) / 127.5 - 1
    steps = torch.linspace(-1, 1, side)
    points = torch.cartesian_prod(steps, steps)
    black = ((torch.arange(side)[:, None] + torch.arange(side)) % 2 == 0).flatten()
    return Dataset("a photograph of scikit-learn", points[black], pixels[black], points[~black], pixels[~black])


@lru_cache
def text() -> tuple[Tensor, str]:
    """The descriptions of scikit-learn's tables, some 20,000 characters: their codes [n], and what each code stands for."""
    from sklearn import datasets

    tables = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
    written = "".join(getattr(datasets, f"load_{name}")().DESCR for name in tables)
    letters = "".join(sorted(set(written)))
    return torch.tensor([letters.index(letter) for letter in written]), letters


@lru_cache
def moons() -> tuple[Tensor, Tensor]:
    """Points of two half circles in the plane [n, 2]: 1,600 to train on, 400 to test."""
    from sklearn.datasets import make_moons

    points = torch.tensor(make_moons(2000, noise=0.05, random_state=0)[0], dtype=torch.float32)
    return points[:1600], points[1600:]
