"""Writes the tables of measurements in docs/cuda.md, between its markers, from bench/results/gpu_h200.json.

`python -m bench.tools.gpu_tables`
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cuda.md"
RESULT = ROOT / "bench" / "results" / "gpu_h200.json"
NETS = ("3072-1024-512-256-128-64-32-16-10", "784-4096-4096-10")

Row = dict[str, Any]


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" if cells[0] != "---" else "|" + "---|" * len(cells) for cells in lines)


def recursion(rows: list[Row]) -> str:
    """`bias_hessian` by size: both sessions, and cuBLAS in the second."""
    before, after = ([row for row in rows if row["session"] == session] for session in ("before", "after"))
    ours, plain, alone = "secondorder, ms", "cuBLAS and elementwise, ms", "three cuBLAS products alone, ms"
    cells = [
        [str((new["k"], new["n"], new["m"])), f'"{new["float32 matmul precision"]}"']
        + [number(value) for value in (old[ours], new[ours], new[plain], new[alone])]
        for old, new in zip(before, after, strict=True)
    ]
    names = [
        "k, n, m",
        "precision",
        "before, ms",
        "after, ms",
        "cuBLAS and elementwise passes, ms",
        "cuBLAS's three products alone, ms",
    ]
    return table(names, cells)


def training(rows: list[Row], net: str) -> str:
    """A step by optimizer in the second session."""
    columns = ["median ms, each step waited for", "mean ms, steps queued", "kernel ms", "launches", "host waits"]
    chosen = [
        row for row in rows if row["session"] == "after" and row["net"] == net and row["float32 matmul precision"] == "high"
    ]
    title = f"**{net}, batch {chosen[0]['batch']}**\n\n"
    return title + table(["", *columns], [[row["optimizer"], *(number(row[column]) for column in columns)] for row in chosen])


def operators(rows: list[Row]) -> str:
    """The operators over a net in the first session."""
    columns = ["plain, eager, ms", "plain, CUDA graph, ms", "secondorder, eager, ms", "secondorder, CUDA graph, ms"]
    cells = [
        [f"`{row['operator']}`", f'"{row["float32 matmul precision"]}"', *(number(row[column]) for column in columns)]
        for row in rows
    ]
    return table(["", "precision", *columns], cells)


def tables() -> dict[str, str]:
    """The tables by the names of their markers."""
    rows = json.loads(RESULT.read_text())["rows"]
    return {
        "recursion": recursion(rows["recursion"]),
        "training": "\n\n".join(training(rows["training"], net) for net in NETS),
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
