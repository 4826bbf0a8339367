"""The fallback: SGD with momentum for parameters that no curvature covers, with one warning."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from secondorder._tensors import Later, Transfer
from secondorder._warnings import warn
from secondorder.errors import NonFiniteError
from secondorder.optim import _momentum


class Update(NamedTuple):
    """One parameter's update by the fallback, not yet taken."""

    parameter: Tensor
    velocity: Tensor
    group: dict[str, Any]


class Fallback:
    """Updates by SGD what is not covered, or refuses.

    Args:
        owner: the optimizer's name, for messages.
        kind: "sgd" or "error".
        names: of the model's parameters.
        reasons: why some of them are not covered, for messages.

    Raises:
        ValueError: `kind` is neither.
    """

    def __init__(self, owner: str, kind: str, names: dict[Tensor, str], reasons: Mapping[Tensor, str]):
        if kind not in ("sgd", "error"):
            raise ValueError(f"{owner}: expected fallback 'sgd' or 'error', got {kind!r}")
        self.owner, self.kind, self.names, self.reasons = owner, kind, names, reasons
        self.warned: set[Tensor] = set()

    def parameters(
        self, param_groups: list[dict[str, Any]], gradients: dict[Tensor, Tensor], covered: Sequence[Tensor]
    ) -> list[tuple[Tensor, dict[str, Any]]]:
        """Returns the parameters with a gradient outside of `covered`, each with its group; warns of new ones.

        Raises:
            RuntimeError: there are some, and the kind is "error".
        """
        rest = dict(gradients)
        for p in covered:
            rest.pop(p, None)  # two layers may share a bias
        if not rest:
            return []
        found = [(p, group) for group in param_groups for p in group["params"] if p in rest]
        new = [p for p, _ in found if p not in self.warned]
        if new:
            names = ", ".join(repr(self.names[p]) for p in new)
            why = "".join(f" ({reason})" for reason in dict.fromkeys(self.reasons[p] for p in new if p in self.reasons))
            if self.kind == "error":
                raise RuntimeError(f"{self.owner}.step(): no curvature covers the parameters {names}{why}, and fallback='error'")
            self.warned.update(new)
            warn(f"no curvature covers the parameters {names}{why}; they are updated by the fallback, SGD.")
        return found

    def check(self, updates: Sequence[tuple[Tensor, Tensor, float]], transfer: Transfer) -> Later[None]:
        """Raises NonFiniteError, once it is called, where an update (p, velocity, lr) by lr times the velocity is not finite."""
        bounded = _momentum.bounded(updates, transfer)

        def checked() -> None:
            for (p, _, _), good in zip(updates, bounded(), strict=True):
                if not good:
                    raise NonFiniteError(
                        f"{self.owner}.step(): the gradient of {self.names[p]!r} holds NaN or inf, or is too large; "
                        "no parameter and no state has changed"
                    )

        return checked

    def updates(
        self, param_groups: list[dict[str, Any]], gradients: dict[Tensor, Tensor], covered: Sequence[Tensor],
        state: Mapping[Tensor, dict[str, Any]],
    ) -> list[Update]:  # fmt: skip
        """Returns the updates of all parameters with a gradient outside of `covered`.

        Raises:
            NonFiniteError: one is not finite.
            RuntimeError: there are some, and the kind is "error".
        """
        found = self.parameters(param_groups, gradients, covered)
        updates = [Update(p, _momentum.velocity(p, gradients[p], group, state), group) for p, group in found]
        self.check([(p, velocity, float(group["lr"])) for p, velocity, group in updates], Transfer())()
        return updates

    def apply(self, updates: list[Update], state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Sets v <- momentum v + g, p <- (1 - lr weight_decay) p - lr v."""
        for p, velocity, group in updates:
            _momentum.apply(p, velocity, group, state, -1.0)
