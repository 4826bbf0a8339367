"""What a script is, and what several of them do alike."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.experiments.harness import Problem, Task, batches


@dataclass(frozen=True, eq=False)
class Script(Problem):
    """A training script with a loss and a loop of its own."""

    start: Callable[[int], Task]  # of the seed
    _: KW_ONLY
    noise: bool = False  # a score that says little: shown, and in no mean

    def begin(self, data_dir: Path | None, seed: int) -> Task:
        return self.start(seed)


def evaluation(
    model: nn.Module, measure: Callable[[], tuple[Tensor, Tensor]], grad: bool = False
) -> Callable[[], tuple[float, float]]:
    """Calls `measure` with the model in evaluation mode, whatever is random the same at every call."""

    def evaluate() -> tuple[float, float]:
        torch.manual_seed(0)
        model.eval()
        with torch.set_grad_enabled(grad):
            loss, score = measure()
        model.train()
        return loss.item(), score.item()

    return evaluate


def task(
    data: str,
    model: nn.Module,
    tensors: tuple[Tensor, ...],
    batch: int,
    seed: int,
    loss: Callable[..., Tensor],
    measure: Callable[[], tuple[Tensor, Tensor]],
    criterion: nn.Module | None = None,
) -> Task:
    """A loop over shuffled batches of the tensors, with a loss of each batch's rows, by this criterion where it has one."""
    return Task(
        data,
        model,
        batches(tensors, batch, seed),
        lambda rows: loss(*rows),
        evaluation(model, measure),
        len(tensors[0]) / batch,
        criterion,
    )


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return 100 * (output.argmax(1) == target).float().mean()
