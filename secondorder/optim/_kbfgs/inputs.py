"""E[h h^T] of every layer before the first step of K-BFGS, from the batches that `initialize` is given."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from secondorder._distributed import RankReducer, RankTerm
from secondorder.optim._kbfgs.closure_pass import ClosurePass
from secondorder.optim._kbfgs.layer_pass import layer_input, layer_second_moment


class InputMoments:
    """E[h h^T] of every layer, over batch after batch.

    Args:
        owner: the optimizer's name, for errors.
        names: the model's linear layers with their names.
        tied: layers whose inputs count as those of one of these.
        wanted: the layers whose moments are wanted.
    """

    def __init__(
        self, owner: str, names: Mapping[nn.Linear, str], tied: Mapping[nn.Linear, nn.Linear], wanted: Collection[nn.Linear]
    ):
        self._owner, self._names, self._tied, self._wanted = owner, names, tied, wanted
        self._moments: dict[nn.Linear, Tensor] = {}
        self._weights: dict[nn.Linear, float] = {}

    def add_model_calls(self, model: nn.Module, batches: Iterable[Any]) -> None:
        """Calls the model with every batch; all rows count alike."""

        def called(layer: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            h = layer_input(layer, args, kwargs)
            self._add(self._tied.get(layer, layer), h, len(h))

        tied = [other for other, layer in self._tied.items() if layer in self._wanted]
        handles = [layer.register_forward_hook(called, with_kwargs=True) for layer in [*self._wanted, *tied]]
        try:
            for batch in batches:
                model(batch)
        finally:
            for handle in handles:
                handle.remove()

    def add_loss_calls(self, loss: Callable[[Any], Tensor], criterion: nn.Module, batches: Iterable[Any]) -> None:
        """Calls the loss with every batch; rows count by the weights of the criterion's targets, ignored ones not.

        Raises:
            RuntimeError: `loss` returns no scalar with its graph.
        """
        for batch in batches:

            def closure(batch: Any = batch) -> Tensor:
                value = loss(batch)
                if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                    got = (
                        f"shape {list(value.shape)}, requires_grad={value.requires_grad}"
                        if isinstance(value, Tensor)
                        else type(value).__name__
                    )
                    raise RuntimeError(
                        f"{self._owner}.initialize(): expected loss to return the scalar loss with its graph, got {got}"
                    )
                value.backward()
                return value

            seen = ClosurePass(self._names, self._tied, parameters=False, criterion=criterion)
            with seen:
                seen.run(closure, self._owner)
            for layer, own in seen.layers.items():
                if layer in self._wanted:
                    self._add(layer, own.input, own.weight)  # a plain mean over the rows of `input` is the mean over the loss

    def _add(self, layer: nn.Linear, h: Tensor, weight: float) -> None:
        """Adds inputs h [m, n_in] that count `weight` together."""
        if weight:
            self._weights[layer] = self._weights.get(layer, 0.0) + weight
            decay = 1 - weight / self._weights[layer]
            self._moments[layer] = layer_second_moment(layer, h, h.mean(0), self._moments.get(layer), decay)

    def averaged(self, ranks: RankReducer | None) -> dict[nn.Linear, Tensor]:
        """Returns the moments, over the batches of all ranks if there are several."""
        if ranks is None:
            return self._moments
        terms = [RankTerm(self._names[layer], moment, self._weights[layer]) for layer, moment in self._moments.items()]
        return dict(zip(self._moments, ranks.average(lambda: terms), strict=True))
