"""How often a step reads a tensor on the host: on a GPU each time it waits for the device. Whatever the number of layers."""

import statistics
from collections.abc import Callable

import pytest
import torch
from helpers.host_reads import HostReads
from torch import nn

import secondorder as so
from secondorder._tensors import Arriving, Transfer

pytestmark = pytest.mark.skipif(not so.build_info()["extension"], reason="plain PyTorch reads more")

# Reads of a step, once the first is over. A loss that a step decides by is one of them.
STEPS = {
    "EACG": (so.EACG, 1),  # whether every layer's solution is finite
    "KBFGS": (so.KBFGS, 3),  # the loss before; the trial's loss and what it stands for; what became of the updates
    "KBFGSL": (so.KBFGSL, 3),
    # Whether cross-entropy ignores targets, by which rows are chosen; the loss of these, the inputs' scale and all else that the
    # dampings come from; whether the solutions are finite, with the quadratic model; the trial's loss.
    "LayerwiseNewton": (so.LayerwiseNewton, 4),
    "KFAC": (so.KFAC, 4),
    # It chooses no rows. Whether the loss' factor leaves the criterion's Hessian positive; and the last three.
    "KFRA": (so.KFRA, 4),
    "KFLR": (so.KFLR, 3),
    # The loss and its coefficients; the factorisation and what the step is to bring; the loss after it. In some steps the
    # comparison of its Jacobian with autograd's, too. Corrections, which some steps make, read twice each.
    "LevenbergMarquardt": (lambda model, criterion: so.LevenbergMarquardt(model.parameters(), corrections=0), 3),
    # At once, on the CPU; on a GPU with one of the next steps, when it no longer waits.
    "EigenAdam": (lambda model, criterion: so.EigenAdam(model), 1),
}
# On a GPU `one_hot` with a number of classes looks at nothing; a loss that is watched, whether targets are ignored, and what the
# loop has done to weights, is read when it has arrived.
ON_THE_CPU_ALONE = ("F.one_hot(", "self._arrived(", "self._all_count.read()", "summary.read()")


@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("name", STEPS)
def test_reads_of_a_step(name: str, layers: int) -> None:
    make, expected = STEPS[name]
    torch.manual_seed(0)
    squares = name == "LevenbergMarquardt"
    rows = 40 if squares else 250  # where some stand for all
    x, target = torch.randn(rows, 9), torch.randint(9 - layers, (rows,))
    target = nn.functional.one_hot(target).float() if squares else target
    assert_reads_of_net(make, nn.MSELoss() if squares else nn.CrossEntropyLoss(), layers, x, target, expected)


def test_a_comparison_of_the_jacobian_reads_once():
    """Whatever the number of parameters, in the steps that compare it with autograd's."""
    torch.manual_seed(0)
    x, target = torch.randn(40, 9), nn.functional.one_hot(torch.randint(4, (40,))).float()
    make, expected = STEPS["LevenbergMarquardt"]
    assert max(assert_reads_of_net(make, nn.MSELoss(), 5, x, target, expected)) == expected + 1


# Beside STEPS, once for each evaluation that records layers: for class weights what they sum up to; for ignored targets whether
# there are any, what the others sum up to, and which rows these are. LayerwiseNewton asks twice whether there are any.
WEIGHTED = {"EACG": (1, 3), "KBFGS": (2, 6), "LayerwiseNewton": (1, 4)}


@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("name", WEIGHTED)
def test_reads_of_a_step_with_weights_of_rows(name: str, ignored: bool, layers: int) -> None:
    make, expected = STEPS[name]
    torch.manual_seed(0)
    x, target = torch.randn(250, 9), torch.randint(9 - layers, (250,))
    if ignored:
        target[::5] = -100
    criterion = nn.CrossEntropyLoss(None if ignored else torch.rand(9 - layers) + 0.5)
    assert_reads_of_net(make, criterion, layers, x, target, expected + WEIGHTED[name][ignored])


def assert_reads_of_net(
    make: Callable[..., torch.optim.Optimizer],
    criterion: nn.Module,
    layers: int,
    x: torch.Tensor,
    target: torch.Tensor,
    expected: int,
) -> list[int]:
    """Of a step of what is made for a net of so many layers, from 9 inputs on."""
    modules = [module for k in range(layers) for module in (nn.Linear(9 - k, 8 - k), nn.Tanh())]
    model = nn.Sequential(*modules[:-1])
    optimizer = make(model, criterion)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = criterion(model(x), target)
        loss.backward()
        return loss

    return assert_reads(optimizer, closure, [*model.parameters(), x, target], expected)


def assert_reads(
    optimizer: torch.optim.Optimizer, closure: Callable[[], torch.Tensor], tensors: list[torch.Tensor], expected: int
) -> list[int]:
    counts = []
    for _ in range(9):
        with HostReads(tensors) as reads:
            if isinstance(optimizer, so.EigenAdam):
                closure()
                optimizer.step()
            else:
                optimizer.step(closure)
        found = {line: count for line, count in reads.found.items() if not any(each in line for each in ON_THE_CPU_ALONE)}
        counts.append(sum(found.values()))
    # A step that tries again, or more dampings than one, reads more.
    assert statistics.median(counts[1:]) == expected, (counts, found)
    return counts[1:]


class Convolved(nn.Module):
    """A net that is evaluated anew, with parameters that no curvature covers."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(nn.Conv1d(1, 3, 3), nn.Tanh(), nn.Conv1d(3, 3, 3), nn.Tanh(), nn.Flatten())
        self.layers = nn.Sequential(nn.Linear(15, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(self.convolutions(x.unsqueeze(1)))


@pytest.mark.filterwarnings("ignore:secondorder")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("parts", "expected"), [(1, 3), (3, 6)])
def test_reads_of_a_step_on_any_model(parts: int, expected: int, reduction: str) -> None:
    """Neither what the fallback updates nor an evaluation of the model adds to them.

    A batch in parts does: backward() looks whether the gradients of the parts before have been set to zero, twice for three
    parts, and the curvature whether all losses' factors are positive.
    """
    torch.manual_seed(0)
    model, criterion, x, target = Convolved(), nn.MSELoss(reduction=reduction), torch.randn(750, 9), torch.randn(750, 4)
    optimizer = so.LayerwiseNewton(model, criterion)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = [criterion(model(h), y) for h, y in zip(x.chunk(parts), target.chunk(parts), strict=True)]
        for loss in losses:
            (loss / parts).backward()
        return torch.stack(losses).mean()

    assert_reads(optimizer, closure, [*model.parameters(), x, target], expected)


@pytest.mark.filterwarnings("ignore:secondorder")
def test_reads_of_a_step_by_a_closure() -> None:
    torch.manual_seed(0)
    model, criterion, x, target = (
        nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 4)),
        nn.MSELoss(),
        *torch.randn(2, 250, 9),
    )
    optimizer = so.LayerwiseNewton(model, criterion)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = criterion(model(x), target[:, :4]) + 1e-3 * sum(p.pow(4).sum() for p in model.parameters())
        loss.backward()
        return loss

    # The inputs' scale; the loss, and that of the criterion alone; by what its calls enter the loss; whether the solutions are
    # finite, with the quadratic model; whether the trial's parameters are finite, before the closure sees them; the trial's loss.
    assert_reads(optimizer, closure, [*model.parameters(), x, target], 6)


def test_reads_of_a_step_that_draws_and_holds_out_residuals() -> None:
    torch.manual_seed(0)
    model, x, target = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 1)), torch.randn(900, 3), torch.randn(900, 1)
    optimizer = so.LevenbergMarquardt(model.parameters(), holdout=True, corrections=0)  # each of which reads twice

    def closure() -> torch.Tensor:
        return nn.functional.mse_loss(model(x), target)

    # One more, for the block of residuals: whether its data pass through layers.
    assert_reads(optimizer, closure, [*model.parameters(), x, target], 4)


def test_a_transfer_brings_all_that_was_given_until_then() -> None:
    x = torch.arange(6.0).view(2, 3)
    with HostReads([x]) as reads:
        transfer = Transfer()
        matrix, numbers = transfer.later(2 * x), transfer.numbers([x.sum(), 7, (x > 2).any()])
        assert sum(reads.found.values()) == 0
        assert numbers() == [15.0, 7, 1.0]
        torch.testing.assert_close(matrix(), 2.0 * torch.arange(6.0).view(2, 3).double())
        assert sum(reads.found.values()) == 1
        late = transfer.later(x[0])
        assert late().tolist() == [0.0, 1.0, 2.0]
        assert numbers() == [15.0, 7, 1.0]
    assert sum(reads.found.values()) == 2


def test_reads_are_counted() -> None:
    x = torch.ones(2, 2)
    with HostReads([x]) as reads:
        float((x * 2).sum())
        (x + 1).tolist()
        bool(x.any())
        number = x[0].sum().cpu()
        float(number), torch.zeros(2, device=x.device).tolist(), torch.zeros(2, device="cpu").tolist()
    assert sum(reads.found.values()) == 5


class OnSecondGpu(torch.Tensor):
    """A tensor of the CPU that says otherwise."""

    is_cuda, device = True, torch.device("cuda:1")


def test_what_arrives_is_waited_for_where_it_comes_from(monkeypatch):
    """Not on the current device, which need not be the tensor's: its stream knows nothing of the copy."""
    recorded = []

    class Event:
        def record(self, stream=None):
            recorded.append(stream or torch.cuda.current_stream())

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"the stream of {device or 'cuda:0'}")
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory, of=torch.empty, **options: of(*args, **options))
    Arriving(torch.ones(3).as_subclass(OnSecondGpu))
    assert recorded == ["the stream of cuda:1"]
