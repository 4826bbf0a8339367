"""Writes the tables of measurements in docs/cuda.md, between its markers, from bench/results/gpu_*.json.

`python -m bench.tools.gpu_tables`
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cuda.md"
RESULTS = ROOT / "bench" / "results"
NETS = ("3072-1024-512-256-128-64-32-16-10", "784-4096-4096-10")
SMALL_NET = "784-256-128-64-32-10"

Row = dict[str, Any]


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" if cells[0] != "---" else "|" + "---|" * len(cells) for cells in lines)


def recursion(rows: list[Row]) -> str:
    """`bias_hessian` by size in the newest session."""
    columns = {
        "secondorder, ms": "secondorder, ms",
        "cuBLAS and elementwise, ms": "cuBLAS and passes, ms",
        "three cuBLAS products alone, ms": "three products alone, ms",
    }
    cells = [
        [f"({row['k']}, {row['n']}, {row['m']})", f'"{row["float32 matmul precision"]}"', *(number(row[key]) for key in columns)]
        for row in rows
        if row["session"] == "third"
    ]
    return table(["k, n, m", "precision", *columns.values()], cells)


def training(rows: list[Row], net: str, session: str) -> str:
    """A step by optimizer in a session."""
    columns = ["median ms, each step waited for", "mean ms, steps queued", "kernel ms", "launches", "host waits"]
    chosen = [row for row in rows if row["session"] == session and row["net"] == net]
    title = f"**{net}, batch {chosen[0]['batch']}**\n\n"
    return title + table(["", *columns], [[row["optimizer"], *(number(row[column]) for column in columns)] for row in chosen])


def operators(rows: list[Row]) -> str:
    """The operators over a net in the third session."""
    columns = [
        "plain, eager, ms",
        "plain, torch.compile, ms",
        "plain, CUDA graph, ms",
        "secondorder, eager, ms",
        "secondorder, CUDA graph, ms",
    ]
    cells = [
        [f"`{row['operator']}`", f'"{row["float32 matmul precision"]}"', *(number(row[column]) for column in columns)]
        for row in rows
        if row["session"] == "third"
    ]
    return table(["", "precision", *columns], cells)


def tasks(runs: list[Row]) -> str:
    """What every run came to, and in how many steps."""
    names = ["", "optimizer", "lr", "steps", "ms a step", "training loss", "test loss", "score"]
    cells = [
        [
            run["task"], run["method"], "" if run["lr"] is None else f"{run['lr']:g}", str(run["steps"]),
            number(run["milliseconds"]), *(number(run[key][-1]) for key in ("train", "test", "score")),
        ]
        for run in runs
    ]  # fmt: skip
    return table(names, cells)


def tables() -> dict[str, str]:
    """The tables by the names of their markers."""
    names = ("h200", "h100", "training", "training_captured")
    h200, h100, trained, captured = (json.loads((RESULTS / f"gpu_{name}.json").read_text()) for name in names)
    rows, later = h200["rows"], h100["rows"]
    return {
        "recursion": recursion(rows["recursion"]),
        "training-h100": "\n\n".join(training(later["training"], net, "sixth") for net in NETS),
        "training-captured": "\n\n".join(training(later["training"], net, "seventh") for net in (*NETS, SMALL_NET)),
        "tasks": tasks(trained["runs"]),
        "tasks-captured": tasks(captured["runs"]),
        "operators": operators(rows["operators"]),
    }


def placed(page: str) -> str:
    """The page with the tables in their places."""
    for name, text in tables().items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = page.split(begin)
        page = before + begin + text + "\n" + end + rest.split(end)[1]
    return page


if __name__ == "__main__":
    PAGE.write_text(placed(PAGE.read_text()))
