"""Interleaved timing: machines are noisy, so compared functions take turns within one run, and ratios are taken per turn."""

import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

import secondorder as so

RESULTS = Path(os.environ.get("BENCH_RESULTS", Path(__file__).parent / "results"))
CIFAR_NET = [3072, 1024, 512, 256, 128, 64, 32, 16, 10]  # of the EA-CG paper


def interleaved(
    functions: dict[str, Callable[[], Any]], baseline: str, rounds: int = 15, periods: dict[str, int] | None = None
) -> dict[str, dict[str, float]]:
    """Per function: "ms", the median over rounds, and "ratio", the median of its quotients to the baseline of the same round.

    In a turn a function is called for about 20 ms. One that does something only every so often, by `periods`, is called
    a multiple of so many times: its time is the mean over a period.
    """
    timers, counts = {}, {}
    for name, function in functions.items():
        timers[name] = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
        period = (periods or {}).get(name, 1)
        counts[name] = period * max(1, min(1000, round(0.02 / timers[name].timeit(period).median / period)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(1000 * timer.timeit(counts[name]).median)
    return {
        name: {
            "ms": statistics.median(values),
            "ratio": statistics.median(v / b for v, b in zip(values, times[baseline], strict=True)),
        }
        for name, values in times.items()
    }


def report(name: str, title: str, rows: dict[str, dict[str, float]], notes: str = "") -> None:
    """Prints a table and stores it, with what it was measured on, as NAME.json in bench/results or $BENCH_RESULTS."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    width = max(map(len, rows))
    print(f"\n{title}\n{'':{width}}" + "".join(f"{c:>10}" for c in columns))
    for label, row in rows.items():
        print(f"{label:{width}}" + "".join(f"{row[c]:10.2f}" if c in row else " " * 10 for c in columns))
    if notes:
        print(notes)
    RESULTS.mkdir(exist_ok=True, parents=True)
    stored = {
        "title": title,
        "command": "python -m "
        + Path(sys.argv[0]).resolve().relative_to(Path.cwd()).with_suffix("").as_posix().replace("/", "."),
        "build": so.build_info(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "rows": rows,
        "notes": notes,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(stored, indent=1) + "\n")


def cpu_name() -> str:
    """As /proc/cpuinfo gives it, where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
