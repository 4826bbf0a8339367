"""`python -m bench.experiments NAME --data-dir DIR`: one of the papers' experiments.

Trains what bench/results does not hold yet, then prints the tables, writes the pictures to docs/, and the tables into
docs/results.md, between the marks of this experiment.
"""

import math
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from bench.experiments import alignment, at_defaults, curvature_errors, eigen_adam, with_deepxde
from bench.experiments.harness import Store, best_runs, matrices, overview, table
from bench.experiments.physics import errors
from bench.experiments.pictures import draw
from bench.experiments.studies import STUDIES
from bench.experiments.training import study
from bench.timing import RESULTS

ROOT = Path(__file__).parents[2]
QUICK = Path("build/experiments")
Name = Enum(
    "Name",
    {
        name: name
        for name in (
            "tables-2-to-5",
            alignment.NAME,
            *at_defaults.COMPARISONS,
            with_deepxde.NAME,
            *STUDIES,
            *eigen_adam.COMPARISONS,
            errors.NAME,
        )
    },
)
CHOOSABLE = (*eigen_adam.COMPARISONS, errors.NAME)  # experiments of which problems can be chosen


def insert(document: Path, name: str, text: str) -> None:
    """Replaces what stands between the marks of an experiment."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    before, _, rest = document.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"expected {begin.strip()} and {end.strip()} in {document}")
    document.write_text(before + begin + text + end + after)


def main(
    name: Annotated[Name, typer.Argument(help="the experiment")],
    data_dir: Annotated[Path | None, typer.Option(help="where the data are, see bench/data.py")] = None,
    seeds: Annotated[int, typer.Option(help="how many; the first one chooses settings")] = 3,
    quick: Annotated[bool, typer.Option(help="one seed, a tenth of the seconds; results in build/experiments")] = False,
    only: Annotated[list[str] | None, typer.Option(help="train these methods alone, without tables and pictures")] = None,
    again: Annotated[bool, typer.Option(help="forget their stored runs first; with --only, or for all methods")] = False,
    problem: Annotated[
        list[str] | None, typer.Option(help=f"of {', '.join(CHOOSABLE)}: these alone; docs/ stays as it is")
    ] = None,
    stored: Annotated[bool, typer.Option(help="of physics: tables of what is stored, no training; docs/ stays")] = False,
) -> None:
    """Does an experiment."""
    if problem and name.value not in CHOOSABLE:
        raise typer.BadParameter(f"expected it with one of {', '.join(CHOOSABLE)}, got {name.value}")
    if stored and name.value != errors.NAME:
        raise typer.BadParameter(f"expected it with {errors.NAME}, got {name.value}")
    results, pictures = (QUICK, QUICK) if quick else (RESULTS, ROOT / "docs")
    share, numbers = (0.1, [0]) if quick else (1.0, list(range(seeds)))
    if name.value == "tables-2-to-5":
        text = curvature_errors.experiment(results / "curvature_errors.json", data_dir, len(numbers), 1 if quick else 5)
    elif name.value == alignment.NAME:
        points = 2 if quick else len(alignment.POINTS)
        text = alignment.experiment(results / "alignment.json", pictures / f"{alignment.NAME}.png", data_dir, points)
    elif name.value in at_defaults.COMPARISONS:
        text = at_defaults.compare(name.value, results, data_dir, numbers, share, only, again)
    elif name.value == with_deepxde.NAME:
        text = with_deepxde.experiment(results / "deepxde.json", numbers, share, again)
    elif name.value in eigen_adam.COMPARISONS:
        text = eigen_adam.compare(name.value, results, data_dir, numbers, share, only, again, problem)
        if not (only or problem):
            eigen_adam.picture(results, pictures / "eigen-adam.png")
    elif name.value == errors.NAME:
        text = errors.stored(results, share, problem) if stored else errors.compare(results, numbers, share, only, again, problem)
        if not (only or problem or stored):
            errors.picture(results, pictures / "equations.png")
    else:
        text = compare(name.value, results, pictures, data_dir, numbers, share, only, again)
    print(text)
    if not (quick or only or problem or stored):
        insert(ROOT / "docs" / "results.md", name.value, text)


def compare(
    name: str,
    results: Path,
    pictures: Path,
    data_dir: Path | None,
    seeds: list[int],
    share: float,
    only: list[str] | None,
    again: bool,
) -> str:
    """Trains, draws, and returns the tables."""
    tables, everything = [], {}
    for i, each in enumerate(STUDIES[name]):
        methods = [method for method in each.methods if not only or method.name in only]
        store = Store(results / f"{each.results}.jsonl")
        if again:
            chosen = {(problem.name, method.name) for problem in each.problems for method in methods}
            store.forget(lambda run, chosen=chosen: (run.problem, run.method) in chosen)
        best = best_runs(study(each.problems, methods, seeds, store, data_dir, share, each.pilot))
        everything |= best
        for problem in each.problems:
            run = next(iter(best[problem.name].values()))[0]
            length = f"{run.budget:g} CPU seconds each" if math.isinf(problem.epochs) else f"epochs: {problem.epochs:g}"
            setup = f"{problem.description}; {run.data}; batch {problem.batch}, {length}."
            shown = matrices if name == "grid" else table
            tables.append(f"{setup}\n\n{shown(problem, best[problem.name])}")
        if each.picture and not only:
            picture = name if len(STUDIES[name]) == 1 else f"{name}-{i + 1}"
            draw(each.problems, best, each.title, pictures / f"{picture}.png")
            tables.append(f"![{each.title}]({picture}.png)")
    if name == "defaults":
        return overview([problem for each in STUDIES[name] for problem in each.problems], everything, "LayerwiseNewton")
    return "\n\n".join(tables)


if __name__ == "__main__":
    typer.run(main)
