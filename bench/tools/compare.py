"""What got slower: compares a new run's results with the stored ones, each by its ratio to plain PyTorch in the same run."""

import json
from pathlib import Path
from typing import Annotated

import typer

from bench.timing import RESULTS


def main(
    new: Annotated[Path, typer.Argument(help="The folder of a new run's results.")],
    old: Annotated[Path, typer.Option(help="The folder to compare with.")] = RESULTS,
    tolerance: Annotated[float, typer.Option(help="Growth of a ratio that counts.")] = 1.15,
) -> None:
    """Prints the rows whose ratio has grown, and exits with 1 if there are any."""
    slower = compared = 0
    for path in sorted(new.glob("*.json")):
        stored = old / path.name
        if not stored.exists():
            print(f"{path.stem}: not stored yet")
            continue
        before, after = (json.loads(p.read_text())["rows"] for p in (stored, path))
        for name in before.keys() & after.keys():
            if "ratio" not in before[name] or "plain PyTorch" in name:
                continue
            compared += 1
            growth = after[name]["ratio"] / before[name]["ratio"]
            if growth > tolerance:
                slower += 1
                print(f"{path.stem}, {name}: {growth:.2f}x, from {before[name]['ratio']:.3f} to {after[name]['ratio']:.3f}")
    print(f"{slower} of {compared} are slower by more than {100 * (tolerance - 1):.0f} %")
    raise typer.Exit(int(slower > 0))


if __name__ == "__main__":
    typer.run(main)
