"""Writes the stored results into docs/performance.md, between its markers, and draws docs/benchmarks.png."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator

from bench.png import save
from bench.timing import RESULTS

DOCS = Path(__file__).parents[2] / "docs"


def stored(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    rows = result["rows"]
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))

    def cell(row: dict[str, float], column: str) -> str:
        return f"{row[column]:.3g}" if abs(row.get(column, 1000)) < 1000 else f"{row[column]:.0f}" if column in row else ""

    lines = [f"**{result['title']}**", "", f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(cell(row, column) for column in columns)} |" for name, row in rows.items()]
    measured = f"Measured on: {result['cpu']}, {result['build']['vectors']} vectors, torch {result['torch']}."
    return "\n".join([*lines, "", f"{result['notes']} {measured}", ""])


def write(markers: list[str]) -> None:
    """Replaces what stands between <!-- NAME --> and <!-- /NAME --> by the tables of all results NAME_*."""
    path = DOCS / "performance.md"
    text = path.read_text()
    for name in markers:
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = text.split(begin)
        text = before + begin + "\n\n" + "\n".join(map(table, stored(f"{name}*.json"))) + "\n" + end + rest.split(end)[1]
    path.write_text(text)


def draw() -> None:
    """Ratios of whole steps to SGD's, one panel per net and batch."""
    results = stored("step_*.json")
    rows = -(-len(results) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(11.5, 4.2 * rows), layout="constrained", squeeze=False, sharey=True)
    for axis in axes.flat[len(results) :]:
        axis.set_visible(False)
    names = list(dict.fromkeys(name for result in results for name in result["rows"]))
    for axis, result in zip(axes.flat, results, strict=False):
        ratios = [result["rows"].get(name, {}).get("ratio", 0) for name in names]
        colours = ["C2" if name.startswith(("EACG", "EigenAdam", "KF", "K-BFGS")) else "C7" for name in names]
        bars = axis.barh(names, ratios, color=colours)
        axis.bar_label(bars, [f"{r:.2f}" if r else "" for r in ratios], fontsize=7, padding=2)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20]))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.axvline(1, color="black", linewidth=0.8)
        sizes, rest = result["title"].removeprefix("Training step, ").split(", ", 1)
        axis.set_title(f"{sizes}\n{rest.split(', float')[0]}", fontsize=7)
        axis.margins(x=0.2)
    axes[0][0].invert_yaxis()
    figure.supxlabel("time of a training step, SGD with momentum = 1", fontsize=9)
    save(figure, DOCS / "benchmarks.png")


def main() -> None:
    write(["budget", "step", "operators", "memory"])
    draw()


if __name__ == "__main__":
    main()
