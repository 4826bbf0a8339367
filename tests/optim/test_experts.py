"""Nets whose branches get no instance now and then, as a mixture of experts."""

import copy

import pytest
import torch
from helpers.optimizers import ALL
from torch import nn

import secondorder as so

pytestmark = pytest.mark.filterwarnings("ignore:secondorder")


class Experts(nn.Module):
    """Every instance by the net that its last feature names, of those that there are."""

    def __init__(self, count=3):
        super().__init__()
        torch.manual_seed(2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6)) for _ in range(count))
        torch.manual_seed(3)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        parts, order = [], []
        for i, expert in enumerate(self.experts):
            rows = (x[:, -1] == i).nonzero().squeeze(1)
            parts.append(expert(x[rows]))
            order.append(rows)
        return self.head(torch.tanh(torch.cat(parts)[torch.cat(order).argsort()]))


def batch(seed, experts):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(12, 4, generator=generator).double(), torch.randint(3, (12,), generator=generator)
    x[:, -1] = torch.arange(12) % experts
    return x, y


def step(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = optimizer.criterion(model(x), y)
        loss.backward()
        return loss

    torch.manual_seed(0)
    optimizer.step(closure)


def state_of(optimizer, layers):
    kept = lambda p: {key: v for key, v in optimizer.state.get(p, {}).items() if key != "average"}  # noqa: E731  # it moves on
    return copy.deepcopy([[p.detach(), kept(p)] for layer in layers for p in layer.parameters()])


@pytest.mark.parametrize("name", ALL)
def test_an_expert_without_instances_stays_as_it_is_and_the_rest_steps_as_without_it(name):
    small, large = Experts(2).double(), Experts(3).double()
    optimizers = [ALL[name](model, nn.CrossEntropyLoss()) for model in (small, large)]
    for model, optimizer in zip((small, large), optimizers, strict=True):
        step(model, optimizer, *batch(0, 2))
    for (key, p), q in zip(small.state_dict().items(), [large.state_dict()[key] for key in small.state_dict()], strict=True):
        torch.testing.assert_close(p, q, msg=key)
    torch.testing.assert_close(large.experts[2].state_dict(), Experts(3).double().experts[2].state_dict())
    # Once it has factors, it keeps them.
    step(large, optimizers[1], *batch(1, 3))
    before = state_of(optimizers[1], large.experts[2])
    assert before[0][1]["step"] == 1
    step(large, optimizers[1], *batch(2, 2))
    torch.testing.assert_close(state_of(optimizers[1], large.experts[2]), before, rtol=0, atol=0)
    step(large, optimizers[1], *batch(3, 3))
    after = state_of(optimizers[1], large.experts[2])
    assert after[0][1]["step"] == 2
    assert not torch.equal(after[0][0], before[0][0])


@pytest.mark.parametrize("name", ["EACG", "KBFGS"])
def test_an_empty_batch_is_still_an_error(name):
    model = Experts(2).double()
    optimizer = ALL[name](model, nn.MSELoss(reduction="sum"))
    x, _ = batch(0, 2)
    with pytest.raises(ValueError, match="expected at least one instance, got an empty batch"):
        step(model, optimizer, x[:0], torch.zeros(0, 3).double())


def test_a_first_batch_may_lack_an_expert_where_the_curvature_is_renewed_seldom():
    model = Experts(3).double()
    optimizer = so.EACG(model, nn.CrossEntropyLoss(), 0.1, curvature_every=3)
    for seed, experts in enumerate((2, 2, 2, 2, 3, 3, 3)):
        step(model, optimizer, *batch(seed, experts))
    assert "step" in optimizer.state[model.experts[2][0].weight]
