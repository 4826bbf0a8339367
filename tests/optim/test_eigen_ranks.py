"""EigenAdam on several ranks that average gradients is EigenAdam in one process with all batches."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers.eigen import batch, network, values
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import secondorder as so


class Experts(nn.Module):
    """Every instance by one of two nets: a batch of positive ones leaves the second without any."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)) for _ in range(2))
        self.double()

    def forward(self, x):
        out = x.new_zeros(len(x), 3)
        for expert, rows in zip(self.experts, (x[:, 0] > 0, x[:, 0] <= 0), strict=True):
            rows = rows.nonzero().squeeze(1)
            out = out.index_add(0, rows, expert(x[rows]))
        return out


class Tables(nn.Module):
    """A table of an embedding and one of a parameter that batches index, of both of which a step meets some rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.parameter = nn.Embedding(70, 6), nn.Parameter(torch.randn(90, 6))
        # No wider: a step's gradient has rank 12, and further directions of a basis would be rounding's.
        self.layers = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 3))
        self.double()

    def forward(self, x):
        indices = (1e4 * x[:, :2].abs()).long()
        pair = self.embedding(indices[:, 0] % 70), self.parameter[indices[:, 1] % 90]
        return self.layers(torch.cat(pair, 1))


MODELS = {"network": network, "experts": Experts, "tables": Tables}


def _batch(name, seed, rows):
    """Inputs and targets; the last rank's choose the first expert, for the first steps."""
    if name == "network":
        return batch(seed, sum(rows))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(rows), 40, generator=generator).double()
    if name == "experts" and seed < 6:
        x[-rows[-1] :, 0] = x[-rows[-1] :, 0].abs()
    return x, torch.randint(3, (sum(rows),), generator=generator)


def _shares(optimizer):
    return [state["share"] for state in optimizer.state.values() if "share" in state]


def _rank(rank, ranks, path, results, rows, name, weighted):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    model = DistributedDataParallel(MODELS[name]())
    optimizer = so.EigenAdam(model)
    for seed in range(12):
        x, y = _batch(name, seed, rows)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.split(rows)[rank]), y.split(rows)[rank])
        (loss * rows[rank] * ranks / sum(rows) if weighted else loss).backward()
        optimizer.step()
    results[rank] = values(model).tolist(), _shares(optimizer)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("rows", "name", "weighted"),
    [
        ((24,), "network", True),
        ((12, 12), "network", True),
        ((5, 12, 9), "network", True),
        ((1, 12, 9), "network", False),
        ((250, 260), "network", True),
        ((49, 51), "experts", True),
        ((3, 12, 5), "tables", True),
        ((3, 12, 5), "tables", False),
    ],
    ids=str,
)
def test_ranks_equal_one_process(rows, name, weighted, tmp_path):
    """With the rank that several have, where there are several; also where one has nothing to show of a layer, at first.

    Losses that are not weighted by rows are the mean of the ranks' means, as in a process that takes their batches in turn.
    """
    ranks = len(rows)
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (ranks, os.fspath(tmp_path / "store"), results, rows, name, weighted), nprocs=ranks)
        found = [torch.tensor(results[rank][0], dtype=torch.float64) for rank in range(ranks)]
        shares = [results[rank][1] for rank in range(ranks)]
    model = MODELS[name]()
    optimizer = so.EigenAdam(model, rank=16 if ranks > 1 else None)
    for seed in range(12):
        optimizer.zero_grad()
        for x, y in zip(*(each.split(rows) for each in _batch(name, seed, rows)), strict=True):
            (F.cross_entropy(model(x), y) * (len(x) / sum(rows) if weighted else 1 / ranks)).backward()
        optimizer.step()
    assert all(torch.equal(found[0], other) for other in found[1:])
    torch.testing.assert_close(found[0], values(model), rtol=1e-6, atol=1e-8)
    assert all(each == _shares(optimizer) for each in shares)
    assert [share for share in shares[0] if 0.1 < share < 1] == shares[0] and len(shares[0]) == (2 if name == "tables" else 0)
