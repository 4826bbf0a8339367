"""Every layer's factors: the bias Hessian and the statistics of its input, averaged with those of earlier steps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secondorder import ops
from secondorder._distributed import RankReducer, RankTerm
from secondorder._tape import LayerRecord
from secondorder._tensors import cast
from secondorder.curvature import Curvature
from secondorder.solvers import Factors, Solver


class FactorSource:
    """Computes the factors that a solver needs, from the tape's records.

    Args:
        curvature: gives the bias Hessians.
        solver: says which statistics of the inputs; None: there are none.
        samples: second moments are over at most so many instances of every forward pass; None: all.
        names: of the layers, for messages.
    """

    def __init__(self, curvature: Curvature, solver: Solver | None, samples: int | None, names: dict[nn.Linear, str]):
        self.curvature, self.solver, self.samples, self.names = curvature, solver, samples, names

    def renewed(
        self, records: list[LayerRecord], groups: Mapping[Tensor, dict[str, Any]], state: Mapping[Tensor, dict[str, Any]],
        ranks: RankReducer | None,
    ) -> dict[nn.Linear, Factors]:  # fmt: skip
        """Returns the factors of every recorded layer with a gradient and an instance, averaged with those in `state`.

        With x_k the factors of renewal k and the group's `factor_decay`, the bias-corrected average of n of them is
        sum_k decay^(n-k) x_k / sum_k decay^(n-k).
        """
        if ranks is None:
            records = [record for record in records if record.instances]  # an expert may get none
        trained = [record for record in records if record.weight.grad is not None and record.weight in groups]
        if ranks is None:
            hessians, statistics = self.curvature.bias_hessians(records), self._statistics(trained)
        else:
            hessians, statistics, idle = self._over_ranks(records, trained, ranks)
            trained = [record for record in trained if record.layer not in idle]
        factors = {}
        averages: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for record in trained:
            own = state.get(record.weight, {})
            new = factors[record.layer] = {"bias_hessian": hessians[record.layer], **statistics[record.layer]}
            if "factors" in own:
                decay, updates = groups[record.weight]["factor_decay"], own["factor_updates"] + 1
                olds, news = averages.setdefault(1 - (1 - decay) / (1 - decay**updates), ([], []))
                olds += [own["factors"][name] for name in new]
                news += new.values()
        for share, (olds, news) in averages.items():
            ops.average_(news, olds, share)  # the old ones stay: the step may fail yet
        return factors

    def _statistics(self, records: list[LayerRecord]) -> dict[nn.Linear, Factors]:
        """Returns the solver's statistics of every layer's inputs."""
        if self.solver is None:
            return {record.layer: {} for record in records}
        if any(len(record.calls) > 1 or record.calls[0].input.dtype != record.dtype for record in records):
            # Inputs are joined or cast by copies, of which there should be one layer's at a time.
            return {record.layer: self._statistics_of([record])[0] for record in records}
        return dict(zip([record.layer for record in records], self._statistics_of(records), strict=True))

    def _statistics_of(self, records: list[LayerRecord]) -> list[Factors]:
        """Returns the statistics of these layers' inputs, computed together."""
        if self.solver is None:
            return [{} for _ in records]
        inputs = [_at_least_one(cast(record.input(), record.dtype)) for record in records]
        if self.samples is None:
            return self.solver.statistics(inputs, inputs)
        return self.solver.statistics(
            inputs, [_at_least_one(cast(record.input(self.samples), h.dtype)) for record, h in zip(records, inputs, strict=True)]
        )

    def _over_ranks(
        self, records: list[LayerRecord], trained: list[LayerRecord], ranks: RankReducer
    ) -> tuple[dict[nn.Linear, Tensor], dict[nn.Linear, Factors], set[nn.Linear]]:
        """Bias Hessians and statistics of the inputs over the batches of all ranks, and the layers without an instance on any."""
        local: list[tuple[nn.Linear, bool, str]] = []

        def terms() -> list[RankTerm]:
            found = []
            for record in records:
                local.append((record.layer, False, "instances"))
                count = torch.tensor(float(record.instances), dtype=torch.float64, device="cpu")
                found.append(RankTerm(f"{self.names[record.layer]}: instances", count))
                for term in self.curvature.local(record):
                    local.append((record.layer, False, term.name))
                    found.append(term._replace(name=f"{self.names[record.layer]}: {term.name}"))
            for record in trained:
                for name, value in self._statistics_of([record])[0].items():
                    local.append((record.layer, True, name))
                    found.append(RankTerm(f"{self.names[record.layer]}: {name}", value, record.counted))
            return found

        averaged: dict[nn.Linear, dict[str, Tensor]] = {record.layer: {} for record in records}
        statistics: dict[nn.Linear, Factors] = {record.layer: {} for record in trained}
        for (layer, is_statistic, name), value in zip(local, ranks.average(terms), strict=True):
            (statistics if is_statistic else averaged)[layer][name] = value
        idle = {layer for layer, terms in averaged.items() if not terms["instances"]}
        return self.curvature.bias_hessians(records, averaged), statistics, idle


def _at_least_one(inputs: Tensor) -> Tensor:
    """Returns the inputs [m, n_in], or a row of zeros where there are none, which then counts for nothing."""
    return inputs if len(inputs) else inputs.new_zeros(1, inputs.shape[1])
