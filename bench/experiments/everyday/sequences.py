"""Sequences: a transformer's encoder over patches, an LSTM over rows."""

import torch
from torch import Tensor, nn

from bench.experiments.everyday.images import classifier
from bench.experiments.everyday.script import Script
from bench.experiments.harness import Task


class PatchTransformer(nn.Module):
    """16 patches of 2 x 2 pixels, each with a learnt position, through two layers of an encoder."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Unfold(2, stride=2)
        self.embedding = nn.Linear(4, width)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embedding(self.patches(x).transpose(1, 2)) + self.position
        return self.head(self.encoder(tokens).mean(1))


class RowLSTM(nn.Module):
    """The eight rows of an image, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 64, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.lstm(x.squeeze(1))
        return self.head(outputs[:, -1])


def transformer(seed: int) -> Task:
    return classifier(PatchTransformer(), 64, seed)


def lstm(seed: int) -> Task:
    return classifier(RowLSTM(), 64, seed)


SCRIPTS = [
    Script(
        "transformer encoder", "16 patches, two layers of width 32, dropout, batch 64", transformer,
        seconds=6, score_name="test accuracy, %", higher=True,
    ),
    Script(
        "LSTM", "eight rows, 64 units, batch 64", lstm, seconds=4, score_name="test accuracy, %", higher=True,
    ),
]  # fmt: skip
