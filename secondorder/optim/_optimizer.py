"""What every optimizer of the package does as torch's own do, whatever it computes."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class SecondOrderOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose state keeps its dtypes and whose groups maximise or minimise alike."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Numbers worth logging, by names: plain floats, also before the first step. Waits for the device; a step does not."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every torch optimizer's, but the state keeps its dtype: under bfloat16 parameters the factors are float32."""
        seen: list[dict[str, Any]] = []  # after the pre-hooks
        last = self.register_load_state_dict_pre_hook(lambda _, given: seen.append(given))
        first = self.register_load_state_dict_post_hook(lambda _: self._restore(seen[0]), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            first.remove()

    def _restore(self, state_dict: dict[str, Any]) -> None:
        """The state once more, of its own dtype and sharing no memory with `state_dict`."""
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, own, strict=True):
            if i in state_dict["state"]:
                self.state[p] = tree_map(
                    lambda leaf, p=p: leaf.to(p.device, copy=True) if isinstance(leaf, Tensor) else leaf, state_dict["state"][i]
                )

    def _maximize(self) -> bool:
        """Whether the loss is maximised: one answer for all groups, for one loss."""
        maximize = {bool(group["maximize"]) for group in self.param_groups}
        if len(maximize) > 1:
            raise ValueError(f"{type(self).__name__}.step(): expected maximize to be the same in all param_groups")
        return maximize.pop()
