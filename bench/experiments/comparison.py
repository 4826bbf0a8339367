"""One method against its peers, each at its best setting: seconds to a peer's loss, losses at the end, scores.

A pair of runs has the same problem, seed and seconds, and so the same loss at first. What the numbers of a pair mean:

- **Time ratio**: the seconds after which the method is at the peer's final loss, as a share of the peer's seconds. Where it never
  is, the seconds over those after which the peer was at the method's final loss, a number above 1. So the ratio of A to B is the
  inverse of B's to A. It lies between 1 / `LIMIT` and `LIMIT`, which a method that diverged has.
- **Loss ratio**: the final losses' quotient; what diverged has its first loss. Where losses may be negative a quotient says
  nothing: there the higher loss counts as 1 + (higher - lower) / (first - lower) times the lower one.
- In both a loss below a thousandth of the first one counts as that: beyond it nothing is left to learn. Of a peer that is there
  before its seconds have passed, the seconds until then count.
- **Score**: a difference in the score's own unit, as points of accuracy or decibels, or in percent of the peer's where it is an
  error. Above zero is better for scores, below zero for errors.
- **Stopped in time**: the same of each run's best score, at any of its evaluations.

A problem's number is the median over seeds; the best peer of a problem is the one with the lowest median of final losses. A name
that goes on after a method's own, behind a comma, is the method in another setting, which is none of its peers.
"""

import math
import statistics
from collections.abc import Callable, Iterable

from bench.experiments.harness import Problem, Run, Setting, spread

LIMIT = 20.0
FLOOR = 1e-3  # of the first loss

Best = dict[str, list[Run]]  # by method, a run per seed


def floor(run: Run, signed: bool) -> float:
    """The loss below which none is told from another."""
    return -math.inf if signed else FLOOR * run.loss[0]


def time_ratio(own: Run, peer: Run, signed: bool = False) -> float:
    """See the module."""
    if own.diverged or peer.diverged:
        return LIMIT if own.diverged else 1 / LIMIT
    lowest = floor(peer, signed)
    if peer.final >= lowest:
        goal, whole = peer.final, peer.seconds[-1]
    else:
        goal, whole = lowest, peer.seconds_to(lowest)
    reached = own.seconds_to(goal)
    ratio = reached / whole if reached < math.inf else own.seconds[-1] / max(peer.seconds_to(own.final), 1e-9)
    return min(LIMIT, max(1 / LIMIT, ratio))


def loss_ratio(own: Run, peer: Run, signed: bool = False) -> float:
    """See the module."""
    own_final, peer_final = (run.loss[0] if run.diverged else run.final for run in (own, peer))
    if signed:
        gained = peer.loss[0] - min(own_final, peer_final)
        lead = abs(own_final - peer_final) / gained if gained > 0 else 0.0
        return 1 + lead if own_final > peer_final else 1 / (1 + lead)
    lowest = floor(peer, signed)
    return max(own_final, lowest) / max(peer_final, lowest)


def score_difference(own: Run, peer: Run, higher: bool, in_time: bool = False) -> float:
    """See the module."""
    best = max if higher else min
    own_score, peer_score = (best(run.score) if in_time else run.score[-1] for run in (own, peer))
    return own_score - peer_score if higher else 100 * (own_score / peer_score - 1)


def paired(value: Callable[..., float], own: list[Run], peer: list[Run], *options: bool) -> float:
    """The median over seeds."""
    peers = {run.seed: run for run in peer}
    return statistics.median(value(run, peers[run.seed], *options) for run in own if run.seed in peers)


def peers_of(method: str, names: Iterable[str]) -> list[str]:
    """All but the method and its other settings."""
    return [name for name in names if name.split(",")[0] != method]


def best_peer(best: Best, method: str) -> str:
    """The one with the lowest median of final losses."""
    return min(peers_of(method, best), key=lambda name: statistics.median(run.final for run in best[name]))


def settings_of(methods: list[str]) -> list[str]:
    """The first method's other settings."""
    return [name for name in methods[1:] if name not in peers_of(methods[0], methods)]


def setting_name(setting: Setting) -> str:
    parts = [f"{setting['lr']:g}"] if "lr" in setting else []
    return ", ".join(parts + (["falling"] if "linear" in setting else []))


def losses(problems: list[Problem], best: dict[str, Best], methods: list[str]) -> str:
    """Markdown: final training losses, with the setting that was chosen."""
    lines = [row(["training loss", "s", *methods]), "|---" * (len(methods) + 2) + "|"]
    for problem in problems:
        cells = [problem.name, f"{next(iter(best[problem.name].values()))[0].budget:g}"]
        for method in methods:
            runs = best[problem.name][method]
            setting = setting_name(runs[0].setting)
            cells.append(spread([run.final for run in runs]) + (f"; {setting}" if setting else ""))
        lines.append(row(cells))
    return "\n".join(lines)


def times(problems: list[Problem], best: dict[str, Best], methods: list[str]) -> str:
    """Markdown: steps, and the first method's time and loss ratios to the best of all peers and to the best Adam."""
    own, others = methods[0], settings_of(methods)
    columns = [
        f"steps: {'; '.join(methods)}",
        "best peer",
        "time ratio",
        "loss ratio",
        "time ratio to Adam",
        "loss ratio to Adam",
        *(f"{other}: time ratio; loss ratio" for other in others),
    ]
    lines = [row(["", *columns]), "|---" * (len(columns) + 1) + "|"]
    for problem in problems:
        runs = best[problem.name]
        peer = best_peer(runs, own)
        steps = [f"{statistics.median(run.steps[-1] for run in runs[method]):.0f}" for method in methods]
        cells = [problem.name, ", ".join(steps), peer]
        for other in (peer, "Adam"):
            cells += _ratios(runs[own], runs[other], problem.signed)
        cells += ["; ".join(_ratios(runs[other], runs[peer], problem.signed)) for other in others]
        lines.append(row(cells))
    return "\n".join(lines)


def _ratios(own: list[Run], peer: list[Run], signed: bool) -> list[str]:
    """Time and loss."""
    ratio = paired(time_ratio, own, peer, signed)
    reached = f"{ratio:.2f}" if ratio <= 1 else f"not reached ({ratio:.2f})"
    return [reached, f"{paired(loss_ratio, own, peer, signed):.3g}"]


def scores(problems: list[Problem], best: dict[str, Best], methods: list[str]) -> str:
    """Markdown: scores at the end; how the first method's differs from the best peer's, stopped in time, too, and from Adam's."""
    own = methods[0]
    columns = ["", "score", *methods, "to the best peer's", "stopped in time", "to Adam's"]
    lines = [row(columns), "|---" * len(columns) + "|"]
    for problem in problems:
        runs = best[problem.name]
        cells = [problem.name, problem.score_name]
        cells += [spread([run.score[-1] for run in runs[method]]) for method in methods]
        peer = best_peer(runs, own)
        for other, in_time in ((peer, False), (peer, True), ("Adam", False)):
            difference = paired(score_difference, runs[own], runs[other], problem.higher, in_time)
            cells.append(f"{difference:+.3g}" + ("" if problem.higher else " %"))
        lines.append(row(cells))
    return "\n".join(lines)


def summary(problems: list[Problem], best: dict[str, Best], methods: list[str]) -> str:
    """Markdown: geometric means over the problems, the worst, and on how many the first method is ahead, in every setting."""
    own = methods[0]
    columns = [
        "",
        "against",
        "time ratio, mean",
        "worst",
        "ahead on",
        "loss ratio, mean",
        "worst",
        "better score on",
        "stopped in time",
    ]
    lines = [row(columns), "|---" * len(columns) + "|"]
    against_best = [(name, "") for name in (own, *settings_of(methods))]
    for name, peer in (*against_best, *((own, peer) for peer in peers_of(own, methods))):
        times, losses, better = {}, {}, [0, 0]
        for problem in problems:
            runs = best[problem.name]
            pair = runs[name], runs[peer or best_peer(runs, own)]
            times[problem.name] = paired(time_ratio, *pair, problem.signed)
            losses[problem.name] = paired(loss_ratio, *pair, problem.signed)
            for in_time in (False, True):
                difference = paired(score_difference, *pair, problem.higher, in_time)
                better[in_time] += difference > 0 if problem.higher else difference < 0
        lines.append(
            row([
                name, peer or "the best peer",
                *mean_and_worst(times), f"{sum(ratio < 1 for ratio in times.values())} of {len(problems)}",
                *mean_and_worst(losses), *(f"{count} of {len(problems)}" for count in better),
            ])
        )  # fmt: skip
    return "\n".join(lines)


def mean_and_worst(ratios: dict[str, float]) -> tuple[str, str]:
    """Of problems' ratios, the geometric mean, and the highest with its problem."""
    worst = max(ratios, key=lambda name: ratios[name])
    return f"{geometric_mean(list(ratios.values())):.2f}", f"{ratios[worst]:.2f}, {worst}"


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
