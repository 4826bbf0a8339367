"""What the microbenchmarks compare computes what it says."""

import pytest
import torch
from torch import nn

import secondorder as so
from bench.literal import LiteralEACG
from bench.micro.nets import Net
from bench.micro.step import functions


def test_the_paper_written_out_is_eacg_at_the_papers_settings():
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(nn.Sequential(nn.Linear(7, 6), nn.Sigmoid(), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 4)).double())
    x, y, criterion = torch.randn(30, 7).double(), torch.randint(4, (30,)), nn.CrossEntropyLoss()
    settings = {"max_cg": 20, "eps_cg": 0.0, "alpha": 0.1}
    literal = LiteralEACG(nets[0], 0.1, **settings)
    optimizer = so.EACG(nets[1], criterion, 0.1, solver="ea-cg-truncated", momentum=0, factor_decay=0, max_step=None, **settings)
    for _ in range(3):
        literal.step(x, y)
        optimizer.zero_grad()
        criterion(nets[1](x), y).backward()
        optimizer.step()
    for ours, written_out in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
        torch.testing.assert_close(ours, written_out, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss, nn.MSELoss])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_step_that_is_timed_can_be_made(criterion):
    compared = functions(Net([7, 6, 5, 4], nn.Sigmoid, criterion), 8, True, False)
    for step in compared.values():
        for _ in range(2):
            step()
    assert {"SGD, momentum", "Adam, fused", "EigenAdam", "EACG", "K-BFGS"} <= compared.keys()
