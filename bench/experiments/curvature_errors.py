"""Tables 2 to 5 of Chen et al.: layer-wise errors of each curvature against the true Hessian, averaged along a training run."""

import json
from pathlib import Path
from statistics import median

import torch
from torch import nn
from tqdm import tqdm

import secondorder as so
from bench.experiments.problems import CIFAR_WIDTHS, cifar10, network
from bench.experiments.training import environment
from secondorder.criteria import BoundedClassificationLoss

BATCH, STEPS = 100, 30  # training steps between two tables


CRITERIA = {"cross-entropy": nn.CrossEntropyLoss, "Eq. 14": BoundedClassificationLoss}
COLUMNS = {
    "Fisher, sampled": "fisher-mc",
    "Fisher, true labels": "fisher-empirical",
    "GN": "gauss-newton",
    "PCH-1": "pch-abs",
    "PCH-2": "pch-clip-all",
    "PCH-2, absolute 8a": "pch-clip",
}
# The Total rows of Tables 2 and 4, and what the paper has in them instead of a name for our two Fisher matrices.
PAPER = {
    "cross-entropy": {"Fisher": 0.1535, "GN": 0.0446, "PCH-1": 0.0402, "PCH-2": 0.0330},
    "Eq. 14": {"Fisher": 0.1198, "PCH-1": 0.0349, "PCH-2": 0.0853},
}


def experiment(path: Path, data_dir: Path | None, seeds: int, points: int) -> str:
    """Stores and returns the tables: medians over seeds of the means over `points` times along the run.

    A run is STEPS (points - 1) steps of LayerwiseNewton with batches of BATCH, on which the errors are measured too.
    """
    torch.set_num_threads(1)
    runs = json.loads(path.read_text()) if path.exists() else []
    data = cifar10(data_dir)
    for criterion_name, seed in tqdm([(c, s) for s in range(seeds) for c in CRITERIA], mininterval=2):
        key = {"criterion": criterion_name, "seed": seed, "points": points}
        if any(key.items() <= run.items() for run in runs):
            continue
        torch.manual_seed(seed)
        criterion = CRITERIA[criterion_name]()
        model = network(CIFAR_WIDTHS, nn.Sigmoid)
        names = [name for name in COLUMNS if criterion_name == "cross-entropy" or name not in ("Fisher, sampled", "GN")]
        # The paper does not say whose path it is; this one leaves the plateau that the net starts on within a few dozen steps.
        optimizer = so.LayerwiseNewton(model, criterion)
        tables, losses = [], []
        for step in range(STEPS * (points - 1) + 1):
            rows = torch.randint(len(data.train_x), (BATCH,))
            x, y = data.train_x[rows], data.train_y[rows]
            if step % STEPS == 0:
                errors = so.diagnostics.curvature_error(model, criterion, x, y, [COLUMNS[name] for name in names]).errors
                tables.append(dict(zip(names, errors.values(), strict=True)))
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append({**key, "data": data.name, "environment": environment(), "losses": losses[::STEPS], "tables": tables})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(json.loads(json.dumps(runs), parse_float=lambda v: float(f"{float(v):.4g}"))) + "\n")
    return "\n\n".join(
        _table(name, [run for run in runs if run["criterion"] == name and run["points"] == points]) for name in CRITERIA
    )


def _table(criterion: str, runs: list[dict]) -> str:
    names = list(runs[0]["tables"][0])
    layers = list(runs[0]["tables"][0][names[0]])

    def error(run: dict, name: str, layer: str) -> float:
        return sum(table[name][layer] for table in run["tables"]) / len(run["tables"])

    def total(run: dict, name: str) -> float:
        return sum(error(run, name, layer) ** 2 for layer in layers) ** 0.5

    lines = [f"| {criterion} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for i, layer in enumerate(layers):
        cells = [f"{median(error(run, name, layer) for run in runs):.4f}" for name in names]
        lines.append(f"| layer {i + 1} | " + " | ".join(cells) + " |")
    totals = {name: [total(run, name) for run in runs] for name in names}
    cells = [f"**{median(values):.4f}** ({min(values):.4f} to {max(values):.4f})" for values in totals.values()]
    lines.append("| total | " + " | ".join(cells) + " |")
    published = {name: PAPER[criterion].get(name.split(",")[0]) for name in names}
    lines.append("| total in the paper | " + " | ".join("-" if v is None else f"{v:.4f}" for v in published.values()) + " |")
    losses = ", ".join(f"{run['losses'][0]:.3f} to {run['losses'][-1]:.3f}" for run in runs)
    return "\n".join(lines) + f"\n\nTraining loss of the runs, from the first table to the last: {losses}."
