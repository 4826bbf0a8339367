"""What a strictly typed script of a user may write; `make lint` checks it, and nothing runs it."""

import torch
from torch import Tensor, nn

from secondorder import EACG, KBFGS, EigenAdam, LevenbergMarquardt
from secondorder.solvers import EACGSolver

model, criterion = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), nn.MSELoss()
adams = [
    EigenAdam(model),
    EigenAdam(model.parameters(), model=model),
    EigenAdam(model.named_parameters(), model=model),
    EigenAdam([{"params": model.parameters(), "lr": 1.0}], lr=torch.tensor(1.0), model=model, capturable=True),
]
others = [EACG(model, criterion, lr=torch.tensor(0.02), solver=EACGSolver()), KBFGS(model, criterion)]
optimizer = LevenbergMarquardt(model.named_parameters())
schedulers = [torch.optim.lr_scheduler.StepLR(each, 10) for each in (*adams, *others, optimizer)]


def closure() -> Tensor:
    """Returns the loss."""
    return (model(torch.ones(2, 3)) - 1).square().mean()


loss: Tensor = optimizer.step(closure)
length: float = adams[0].metrics()["length"]
