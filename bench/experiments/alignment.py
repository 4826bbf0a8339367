"""Figures 5 to 7 of Botev et al.: how the steps of approximate Gauss-Newton blocks are aligned with the exact ones."""

import copy
import json
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import tqdm

import secondorder as so
from bench.experiments.harness import Supervised
from bench.experiments.pictures import COLORS, LINES
from bench.experiments.problems import AUTOENCODERS
from bench.experiments.training import environment
from bench.png import save
from secondorder.curvature import curvature_by_name
from secondorder.diagnostics import bias_hessians, gauss_newton_step, step_cosines
from secondorder.solvers import SolverOptions, second_moment, solver_by_name

NAME = "kfra-figures-5-to-7"
BATCH, POINTS = 1000, (0, 5, 20, 50, 100, 200)
# CG ends where the residual is a hundredth of the gradient, or after 60 iterations.
ITERATIONS, TOLERANCE = 60, 1e-2
APPROXIMATIONS = {
    "KFRA": ("gauss-newton", "exact"),
    "KFRA*": ("gauss-newton", "kfi"),
    "KFAC": ("fisher-mc", "exact"),
    "KFAC*": ("fisher-mc", "kfi"),
}
BLOCKS = "block-diagonal"


def experiment(path: Path, picture: Path, data_dir: Path | None, points: int) -> str:
    """Stores what is missing of the first `points` points of every trajectory; draws, and returns the tables."""
    torch.set_num_threads(1)
    runs = json.loads(path.read_text()) if path.exists() else []
    for problem in tqdm(AUTOENCODERS, mininterval=2):
        if any(run["problem"] == problem.name and len(run["points"]) >= points for run in runs):
            continue
        runs = [run for run in runs if run["problem"] != problem.name] + [_trajectory(problem, data_dir, points)]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(json.loads(json.dumps(runs), parse_float=lambda v: float(f"{float(v):.4g}"))) + "\n")
    by_name = {run["problem"]: run for run in runs}
    runs = [by_name[problem.name] for problem in AUTOENCODERS]
    _draw(runs, picture)
    return "\n\n".join([*map(_table, runs), f"![Alignment with the exact steps]({picture.name})", _measured_on(runs)])


def _trajectory(problem: Supervised, data_dir: Path | None, points: int) -> dict:
    """The cosines along the path of KFRA with Kronecker-factored inverses, each on the mini-batch of the step to come."""
    torch.manual_seed(0)
    data, model = problem.data(data_dir), problem.model()
    criterion = type(problem.criterion())()  # the mean over pixels, too: angles do not depend on the scale of the loss
    optimizer = so.KFRA(model, criterion)
    found = []
    for step in range(POINTS[points - 1] + 1):
        rows = torch.randint(len(data.train_x), (BATCH,))
        x, y = data.train_x[rows], data.train_y[rows]
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        if step in POINTS:
            group = optimizer.param_groups[0]
            first = group["tau"] is None
            tau, gamma = (0.01 * loss.item() if first else group[key] for key in ("tau", "gamma"))
            exact = copy.deepcopy(model).double()  # float32's eigenvalues may be negative by more than the damping
            found.append({"step": step, "loss": loss.item(), **_cosines(exact, criterion, x.double(), y.double(), tau, gamma)})
        optimizer.step()
    return {"problem": problem.name, "data": data.name, "environment": environment(), "points": found}


def _cosines(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, tau: float, gamma: float) -> dict:
    """Of every approximation's direction: by layer with the block-diagonal matrix' step, and with the full one's."""
    solve = {"max_iter": ITERATIONS, "tol": TOLERANCE}
    blocks = gauss_newton_step(model, criterion, x, y, gamma, blocks=True, **solve)
    full = gauss_newton_step(model, criterion, x, y, tau, **solve)
    directions = {name: _direction(model, criterion, x, y, *how, gamma) for name, how in APPROXIMATIONS.items()}
    own = {name: step_cosines(model, step, blocks) for name, step in directions.items()}
    return {
        "layers": {name: list(each.layers.values()) for name, each in own.items()},
        "blocks": {name: each.total for name, each in own.items()},
        "full": {name: step_cosines(model, step, full).total for name, step in [*directions.items(), (BLOCKS, blocks)]},
    }


def _direction(
    model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, curvature: str, solver: str, damping: float
) -> dict[str, Tensor]:
    """P and d of every layer from this batch's factors alone."""
    hessians = bias_hessians(model, criterion, x, y, curvature_by_name(curvature))
    method = solver_by_name(solver, SolverOptions())
    direction, h = {}, x
    model.zero_grad()
    criterion(model(x), y).backward()
    with torch.no_grad():
        for index, layer in enumerate(model):
            name = str(index)
            if isinstance(layer, nn.Linear):
                factors = {"bias_hessian": hessians[name], "input_second_moment": second_moment(h)}
                weight, bias = layer.weight.grad, layer.bias.grad
                p, d = method.solve(method.prepare(factors, 1.0, damping), weight, bias)
                direction |= {f"{name}.weight": p, f"{name}.bias": d}
            h = layer(h)
    return direction


def _table(run: dict) -> str:
    names = [*APPROXIMATIONS, BLOCKS]
    head = "| | " + " | ".join(f"{name}, blocks" for name in APPROXIMATIONS) + " | " + " | ".join(f"{n}, full" for n in names)
    lines = [f"{run['problem']} ({run['data']}):", "", head + " |", "|---" * (1 + 2 * len(names) - 1) + "|"]
    for point in run["points"]:
        cells = [f"{point['blocks'][name]:.3f}" for name in APPROXIMATIONS] + [f"{point['full'][name]:.3f}" for name in names]
        lines.append(f"| step {point['step']}, loss {point['loss']:.4g} | " + " | ".join(cells) + " |")
    layers = {
        name: [mean(each) for each in zip(*(p["layers"][name] for p in run["points"]), strict=True)] for name in APPROXIMATIONS
    }
    texts = [f"{name} {', '.join(f'{value:.2f}' for value in values)}" for name, values in layers.items()]
    return "\n".join([*lines, "", f"By layer, mean over these steps: {'; '.join(texts)}."])


def _measured_on(runs: list[dict]) -> str:
    return f"Measured on: {'; '.join(sorted({run['environment'] for run in runs}))}."


def _draw(runs: list[dict], path: Path) -> None:
    """A row per data set: the mean over layers of the cosines with the blocks' steps, and the cosines with the full one."""
    figure, axes = plt.subplots(len(runs), 2, figsize=(10, 0.6 + 2.6 * len(runs)), squeeze=False, layout="constrained")
    for run, row in zip(runs, axes, strict=True):
        steps = [1 + point["step"] for point in run["points"]]
        for i, name in enumerate([*APPROXIMATIONS, BLOCKS]):
            style = {"color": COLORS[i], "linestyle": LINES[i % 2], "marker": "o", "markersize": 3, "label": name}
            if name != BLOCKS:
                row[0].plot(steps, [mean(point["layers"][name]) for point in run["points"]], **style)
            row[1].plot(steps, [point["full"][name] for point in run["points"]], **style)
        row[0].set_ylabel(f"{run['problem']}\ncosine")
        for axis in row:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set_ylim(0, 1.03)
            axis.grid(alpha=0.3)
    axes[0][0].set_title("with the block-diagonal Gauss-Newton step, mean over layers", fontsize="medium")
    axes[0][1].set_title("with the full Gauss-Newton step", fontsize="medium")
    for axis in axes[-1]:
        axis.set_xlabel("step of KFRA*")
    handles, labels = axes[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    save(figure, path)
