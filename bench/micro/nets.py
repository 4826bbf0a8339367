"""The nets that the benchmarks train."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.timing import CIFAR_NET


@dataclass(frozen=True)
class Net:
    """A fully connected net with the task it is for."""

    sizes: list[int]
    activation: Callable[[], nn.Module]
    criterion: Callable[[], nn.Module]

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.sizes))}, {self.activation.__name__}"

    def model(self) -> nn.Sequential:
        """The same weights at every call."""
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for n_in, n_out in zip(self.sizes, self.sizes[1:]):
            layers += [nn.Linear(n_in, n_out), self.activation()]
        return nn.Sequential(*layers[:-1])

    def batch(self, m: int) -> tuple[Tensor, Tensor]:
        """Random inputs and targets, the same at every call."""
        torch.manual_seed(1)
        x = torch.rand(m, self.sizes[0])
        classes = self.criterion is nn.CrossEntropyLoss
        return x, torch.randint(self.sizes[-1], (m,)) if classes else torch.rand(m, self.sizes[-1])


HALF = [784, 1000, 500, 250, 30]
NETS = {
    "digits": Net([784, 256, 128, 64, 32, 10], nn.Sigmoid, nn.CrossEntropyLoss),
    "cifar": Net(CIFAR_NET, nn.Sigmoid, nn.CrossEntropyLoss),  # the two of Chen et al.
    "imagenet": Net([150528, *CIFAR_NET[1:]], nn.Sigmoid, nn.CrossEntropyLoss),
    "autoencoder": Net([*HALF, *HALF[-2::-1]], nn.Sigmoid, nn.BCEWithLogitsLoss),  # of Botev et al. and Goldfarb et al.
    "pinn": Net([2, 64, 64, 64, 64, 1], nn.Tanh, nn.MSELoss),
    "tabular": Net([64, 256, 256, 256, 10], nn.ReLU, nn.CrossEntropyLoss),
}
