"""Compares curvatures and steps on a live model with the true Hessian, the Newton step of its blocks, and the loss itself.

Everything is computed on copies: parameters, gradients, buffers, modes, the records of optimizers and the random generators are
left as they were. So two calls of `curvature_error` sample the same labels. A model with random layers belongs in eval mode.

The functions that judge a step take the model from before it, and the step as {parameter name: change}:

    import copy

    import torch
    from torch import nn

    import secondorder as so

    model, criterion = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), nn.CrossEntropyLoss()
    x, y = torch.randn(50, 4), torch.randint(3, (50,))
    optimizer = so.LayerwiseNewton(model, criterion)
    criterion(model(x), y).backward()

    old = copy.deepcopy(model)
    optimizer.step()
    step = {name: (p - q).detach() for (name, p), q in zip(model.named_parameters(), old.parameters())}
    print(so.diagnostics.newton_cosine(old, criterion, x, y, step, damping=0.1))
    print(so.diagnostics.gauss_newton_cosine(old, criterion, x, y, step, damping=0.1))
    print(so.diagnostics.reduction_ratio(old, criterion, x, y, step))
"""

from secondorder.diagnostics.comparisons import Cosines, gauss_newton_cosine, newton_cosine, reduction_ratio, step_cosines
from secondorder.diagnostics.curvatures import CurvatureErrors, bias_hessians, curvature_error, spectrum, true_bias_hessians
from secondorder.diagnostics.steps import gauss_newton_step, newton_step

__all__ = [
    "Cosines", "CurvatureErrors", "bias_hessians", "curvature_error", "gauss_newton_cosine", "gauss_newton_step",
    "newton_cosine", "newton_step", "reduction_ratio", "spectrum", "step_cosines", "true_bias_hessians",
]  # fmt: skip
