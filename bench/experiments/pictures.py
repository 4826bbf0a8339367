"""Pictures of experiments: training loss and score against seconds and epochs, as PNG."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from bench.experiments.harness import Run, Supervised
from bench.png import save

# Okabe and Ito's colours, told apart by the colour-blind; lines differ in style as well.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F", "#E69F00"]
LINES = ["-", "--", "-."]
BLUE, RED, GREEN, PINK, SKY, GREY, YELLOW = COLORS
KNOWN = {  # a method looks the same in every picture; the three that are untuned are thick
    "LayerwiseNewton": ("#000000", "-", 2.4),
    "EigenAdam": (RED, "-", 2.4),
    "LevenbergMarquardt": (BLUE, "-", 2.4),
    "Adam": (SKY, "--", 1.5),
    "Muon": (GREEN, "--", 1.5),
    "SOAP": (PINK, "-.", 1.5),
    "SGD": (GREY, "-.", 1.5),
    "RMSprop": (GREY, "--", 1.5),
    "L-BFGS": (GREY, "-", 1.5),
    "EACG": (YELLOW, "-", 1.5),
    "EACG, max_step=None": (YELLOW, "-", 1.5),
    "KFAC": (GREEN, "-.", 1.5),
    "KFRA": (PINK, "-", 1.5),
    "KFLR": (PINK, "--", 1.5),
    "K-BFGS": (BLUE, "-.", 1.5),
    "K-BFGS(L)": (BLUE, "--", 1.5),
}


def style(name: str, names: Sequence[str]) -> dict[str, Any]:
    """The look of a method among those of a picture."""
    i = [each for each in names if each not in KNOWN].index(name) if name not in KNOWN else 0
    color, line, width = KNOWN.get(name, (COLORS[i % len(COLORS)], LINES[i % len(LINES)], 1.5))
    return {"color": color, "linestyle": line, "linewidth": width}


def draw(problems: list[Supervised], best: dict[str, dict[str, list[Run]]], title: str, path: Path) -> None:
    """A row per problem: training loss, then score, against seconds and against epochs; median and range of seeds."""
    figure, axes = plt.subplots(len(problems), 4, figsize=(13, 0.7 + 3.1 * len(problems)), squeeze=False, layout="constrained")
    names = list(dict.fromkeys(name for methods in best.values() for name in methods))
    for problem, row in zip(problems, axes):
        for name, runs in best[problem.name].items():
            look = style(name, names)
            for axis, x, y in zip(row, ("seconds", "epochs") * 2, ("loss", "loss", "score", "score")):
                n = min(len(run.seconds) for run in runs)
                xs = np.median([getattr(run, x)[:n] for run in runs], axis=0)
                ys = np.array([getattr(run, y)[:n] for run in runs])
                axis.plot(xs, np.median(ys, axis=0), **look, label=name)
                axis.fill_between(xs, ys.min(0), ys.max(0), color=look["color"], alpha=0.15, linewidth=0)
        everything = [run for runs in best[problem.name].values() for run in runs]
        limits(row[:2], [run.loss for run in everything], problem.log_loss)
        if problem.log_score:
            limits(row[2:], [run.score for run in everything], True)
        for axis in row[1::2]:
            axis.set_xscale("symlog", linthresh=1)
            axis.set_xlim(left=0)
            axis.xaxis.set_major_formatter("{x:g}")
        row[0].set_ylabel(f"{problem.name}\ntraining loss")
        row[2].set_ylabel(problem.score_name)
        for axis in row:
            axis.grid(alpha=0.3)
    for axis, label in zip(axes[-1], ("CPU seconds on one thread", "epochs") * 2):
        axis.set_xlabel(label)
    handles = {label: h for axis in axes[:, 0] for h, label in zip(*axis.get_legend_handles_labels())}
    columns = len(handles) if len(handles) <= 6 else -(-len(handles) // 2)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(title)
    save(figure, path)


def panels(
    best: dict[str, dict[str, list[Run]]],
    path: Path,
    columns: int = 3,
    what: str = "training loss",
    values: Callable[[Run], list[float]] = lambda run: run.loss,
) -> None:
    """A panel per problem: training loss, or other values, against seconds; medians over seeds."""
    rows = -(-len(best) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(12, 0.4 + 2.8 * rows), squeeze=False, layout="constrained")
    names = list(dict.fromkeys(name for methods in best.values() for name in methods))
    handles: dict[str, Any] = {}
    for (problem, methods), axis in zip(best.items(), axes.flat):
        for name, runs in methods.items():
            n = min(len(run.seconds) for run in runs)
            median = [np.median([each(run)[:n] for run in runs], axis=0) for each in (lambda run: run.seconds, values)]
            handles[name] = axis.plot(*median, **style(name, names))[0]
        limits([axis], [values(run) for runs in methods.values() for run in runs], True)
        axis.set_title(problem, fontsize="medium")
        axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel(what)
    for axis in axes[-1]:
        axis.set_xlabel("CPU seconds on one thread")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    save(figure, path)


def limits(axes: Sequence[Axes], curves: list[list[float]], log: bool) -> None:
    """From a little below the lowest value to a little above where the curves begin, whatever a diverging one does."""
    low, high = min(min(curve) for curve in curves), max(curve[0] for curve in curves)
    for axis in axes:
        axis.set_ylim(low / 1.15 if low > 0 else low, high * 1.15)
        if log:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            labelled = "235" if high < 50 * low else ""
            axis.yaxis.set_minor_formatter(lambda y, _, digits=labelled: f"{y:g}" if f"{y:e}"[0] in digits else "")
