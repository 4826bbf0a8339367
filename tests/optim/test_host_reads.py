"""How often a step reads a tensor on the host: on a GPU each time it waits for the device. Whatever the number of layers."""

import statistics

import pytest
import torch
from helpers.host_reads import HostReads
from torch import nn

import secondorder as so

# Reads of a step, once the first is over. A loss that a step decides by is one of them.
STEPS = {
    "EACG": (so.EACG, 1),  # whether every layer's solution is finite
    "KBFGS": (so.KBFGS, 3),  # the loss before; the trial's loss and what it stands for; what became of the updates
    "KBFGSL": (so.KBFGSL, 3),
    # The loss, its factor, and whether rows stand for all; the inputs' scale; the factorisations and the solutions; the quadratic
    # model, in three; the trial's parameters and loss.
    "LayerwiseNewton": (so.LayerwiseNewton, 12),
    "KFAC": (so.KFAC, 12),
    "KFRA": (so.KFRA, 11),
    "KFLR": (so.KFLR, 10),
    "LevenbergMarquardt": (lambda model, criterion: so.LevenbergMarquardt(model.parameters()), 13),
    # At once, on the CPU; on a GPU with one of the next steps, when it no longer waits.
    "EigenAdam": (lambda model, criterion: so.EigenAdam(model), 1),
}
# On a GPU `one_hot` with a number of classes looks at nothing; a loss that is watched, and whether targets are ignored, is read
# when it has arrived.
ON_THE_CPU_ALONE = ("F.one_hot(", "self._arrived(", "return bool(self._flag)")


@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("name", STEPS)
def test_reads_of_a_step(name: str, layers: int) -> None:
    make, expected = STEPS[name]
    torch.manual_seed(0)
    modules = [module for k in range(layers) for module in (nn.Linear(9 - k, 8 - k), nn.Tanh())]
    model, squares = nn.Sequential(*modules[:-1]), name == "LevenbergMarquardt"
    rows = 40 if squares else 250  # where some stand for all
    x, target = torch.randn(rows, 9), torch.randint(9 - layers, (rows,))
    target = nn.functional.one_hot(target).float() if squares else target
    criterion = nn.MSELoss() if squares else nn.CrossEntropyLoss()
    optimizer = make(model, criterion)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = criterion(model(x), target)
        loss.backward()
        return loss

    counts = []
    for _ in range(6):
        with HostReads([*model.parameters(), x, target]) as reads:
            if name == "EigenAdam":
                closure()
                optimizer.step()
            else:
                optimizer.step(closure)
        found = {line: count for line, count in reads.found.items() if not any(each in line for each in ON_THE_CPU_ALONE)}
        counts.append(sum(found.values()))
    # A step that tries again, or more dampings than one, reads more.
    assert statistics.median(counts[1:]) == expected, (counts, found)


def test_reads_are_counted() -> None:
    x = torch.ones(2, 2)
    with HostReads([x]) as reads:
        float((x * 2).sum())
        (x + 1).tolist()
        bool(x.any())
        number = x[0].sum().cpu()
        float(number), torch.zeros(2, device="cpu").tolist()
    assert sum(reads.found.values()) == 5
