"""EigenAdam as it is, untuned, against other optimizers at their best settings: on the papers' problems and everyday scripts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import secondorder as so
from bench import peers
from bench.experiments import comparison
from bench.experiments.everyday import SCRIPTS
from bench.experiments.everyday.script import Script
from bench.experiments.harness import Method, Problem, Store, best_runs, grid
from bench.experiments.pictures import panels
from bench.experiments.problems import AUTOENCODERS, CLASSIFIERS, DIGITS, FASHION, MIXTURE, PINN, ROBUST
from bench.experiments.training import study

OWN = "EigenAdam"
FALLING = f"{OWN}, falling"  # what it gains where the end is known


def _adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr, fused=True)


def _peer(name: str, make: Callable[..., torch.optim.Optimizer], fixed: list[float], falling: list[float]) -> Method:
    """A peer with learning rates that stay, and some that fall linearly to zero at the end of the seconds."""
    settings = grid(lr=fixed) + grid(lr=falling, linear=[1.0])
    return Method(name, lambda model, _, lr: make(model, lr), settings)


_UNTUNED = Method(OWN, lambda model, _: so.EigenAdam(model))
METHODS = [
    _UNTUNED,
    Method(FALLING, lambda model, _, lr: so.EigenAdam(model, lr), grid(lr=[1.0], linear=[1.0])),
    _peer("Adam", _adam, [1e-3, 3e-3, 1e-2], [3e-3, 1e-2]),
    _peer("Muon", peers.muon, [3e-3, 1e-2, 3e-2], [1e-2, 3e-2]),
    _peer("SOAP", peers.soap, [1e-3, 3e-3, 1e-2, 3e-2], [3e-3]),
]
FURTHER = [  # peers that are made for larger nets, or whose averages take the place of a schedule
    _UNTUNED,
    _peer("Adam", _adam, [1e-3, 3e-3, 1e-2], [1e-2]),
    _peer("Schedule-Free AdamW", peers.schedule_free, [1e-3, 3e-3, 1e-2, 3e-2], []),
    _peer("Shampoo", peers.shampoo, [1e-3, 3e-3, 1e-2], [1e-2]),
    _peer("PSGD-Kron", peers.psgd_kron, [1e-3, 3e-3, 1e-2], [3e-3]),
]
if peers.has_cosmos():
    FURTHER.append(_peer("COSMOS", peers.cosmos, [3e-3, 1e-2, 3e-2], [1e-2]))


def _for(problems: list[Problem], seconds: float) -> list[Problem]:
    return [replace(problem, seconds=seconds) for problem in problems]


PAPERS: list[Problem] = [
    *_for([DIGITS, FASHION], 4),
    *_for(CLASSIFIERS[:2], 5),
    *_for(CLASSIFIERS[2:], 6),
    *_for([replace(problem, name=f"{problem.name}, batch 100", batch=100) for problem in AUTOENCODERS], 5),
    *_for([replace(problem, name=f"{problem.name}, batch 500") for problem in AUTOENCODERS], 8),
    *_for([MIXTURE], 4),
    *_for(ROBUST, 2),
    *_for([PINN], 4),
]
# Of both comparisons, what the README shows: where it is ahead, and where it is not.
SHOWN = {
    "Fashion-MNIST": "classifier, Fashion-MNIST",
    "CIFAR-10, cross-entropy": "MLP, CIFAR-10 at 16 x 16",
    "MNIST, batch 100": "autoencoder, MNIST",
    "VAE": "variational autoencoder, MNIST",
    "transformer encoder": "transformer encoder, tokens",
    "labels, cross-entropy": "digits, 40 % of the labels random",
}


@dataclass(frozen=True)
class Contest:
    problems: list[Problem]
    methods: list[Method]
    results: str  # the stored runs' file, without its ending


COMPARISONS = {
    "eigen-adam": Contest(PAPERS, METHODS, "eigen_adam"),
    "everyday": Contest(SCRIPTS, METHODS, "eigen_adam"),
    "further-peers": Contest(SCRIPTS, FURTHER, "further_peers"),
}


def compare(
    name: str,
    results: Path,
    data_dir: Path | None,
    seeds: list[int],
    share: float = 1.0,
    only: list[str] | None = None,
    again: bool = False,
    chosen: list[str] | None = None,
) -> str:
    """Trains what is not stored yet; returns the tables, which `only` leaves out.

    Args:
        name: of the comparison.
        results: the folder of the stored runs.
        data_dir: see `bench.data`.
        seeds: the first one chooses settings.
        share: of each problem's seconds.
        only: these methods alone.
        again: forget their stored runs first.
        chosen: these problems alone.

    Raises:
        ValueError: one of the chosen problems is none of this comparison's.
    """
    contest = COMPARISONS[name]
    problems = [problem for problem in contest.problems if not chosen or problem.name in chosen]
    if unknown := set(chosen or []) - {problem.name for problem in problems}:
        raise ValueError(f"expected problems of {[problem.name for problem in contest.problems]}, got {sorted(unknown)}")
    methods = [method for method in contest.methods if not only or method.name in only]
    store = Store(results / f"{contest.results}.jsonl")
    if again:
        forgotten = {(problem.name, method.name) for problem in problems for method in methods}
        store.forget(lambda run: (run.problem, run.method) in forgotten)
    runs = study(problems, methods, seeds, store, data_dir, share)
    return "" if only else tables(problems, best_runs(runs))


def picture(results: Path, path: Path) -> None:
    """Draws the stored runs of what the README shows."""
    best = best_runs(Store(results / "eigen_adam.jsonl").runs())
    for runs in best.values():
        runs.pop(FALLING, None)  # the papers' problems have none
    panels({title: best[problem] for problem, title in SHOWN.items() if problem in best}, path)


def tables(problems: list[Problem], best: dict[str, comparison.Best]) -> str:
    """Markdown: what is trained, then the means, then a line per problem."""
    methods = list(best[problems[0].name])
    counted = [problem for problem in problems if not (isinstance(problem, Script) and problem.noise)]
    machines = sorted({run.environment for runs in best.values() for each in runs.values() for run in each})
    setups = [f"- {problem.name}: {problem.description}; {best[problem.name][OWN][0].data}." for problem in problems]
    parts = [
        *([comparison.summary(counted, best, methods)] if counted else []),
        comparison.times(problems, best, methods),
        comparison.losses(problems, best, methods),
        comparison.scores(problems, best, methods),
        "\n".join(setups),
        f"Measured on: {'; '.join(machines)}.",
    ]
    return "\n\n".join(parts)
