"""What every optimizer of the package does as torch's own do, whatever it computes."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secondorder._tensors import captured_now, device_for, is_sharded, outside_inference_mode
from secondorder._warnings import warn
from secondorder.optim._numbers import check_flags

WHOLE = (
    "expected whole parameters on every rank, as under DistributedDataParallel, since the curvature of a layer needs its whole "
    "weight; EigenAdam takes what fully_shard has sharded"
)


class SecondOrderOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose state keeps its dtypes and is checked, and whose groups maximise or minimise alike."""

    _group_keys: ClassVar[tuple[str, ...]] = ()  # what tells a saved group of this optimizer, of any version, from others'
    _takes_shards: ClassVar[bool] = False  # whether parameters may be DTensors
    _instead_of_capture: ClassVar[str] = "call step() without a capture"

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Returns numbers worth logging, by name: floats, also before the first step. Waits for the device; a step does not."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as every torch optimizer does.

        Raises:
            TypeError: a parameter is no tensor; or it is a DTensor, and not for an optimizer that can do with some of its rows.
        """
        with self._group_or_nothing():
            self._add_group(param_group)

    @contextmanager
    def _group_or_nothing(self) -> Iterator[None]:
        """Gives the groups the parameters back that they had, where an error ends what adds one."""
        before: list[dict[str, Any]] = [
            {key: list(group[key]) for key in ("params", "param_names") if key in group} for group in self.param_groups
        ]
        try:
            yield
        except BaseException:
            del self.param_groups[len(before) :]
            for group, kept in zip(self.param_groups, before, strict=True):
                group.update(kept)
            raise

    def _moved(self, param_group: dict[str, Any], moves: Callable[[Tensor], bool]) -> dict[str, Any]:
        """Returns a group that is about to be added; those of its parameters that may move have left the groups they are in."""
        params = param_group.get("params") if isinstance(param_group, dict) else None
        if params is None or isinstance(params, set):  # an error of torch's
            return param_group
        given = list(params) if isinstance(params, Iterable) and not isinstance(params, Tensor) else [params]
        for p in (each[1] if isinstance(each, tuple) else each for each in given):
            if isinstance(p, Tensor) and moves(p):
                leave_group(p, self.param_groups)
        return {**param_group, "params": given}

    def _add_group(self, param_group: dict[str, Any]) -> None:
        try:
            super().add_param_group(param_group)
        except TypeError as error:
            given = param_group["params"]
            if isinstance(given, nn.Module) or (isinstance(given, list) and any(isinstance(each, nn.Module) for each in given)):
                raise TypeError(
                    f"{type(self).__name__}: expected parameters in a list or in a group, got a module; write model.parameters() "
                    "in a group, and give several models as one, nn.ModuleList([first, second])"
                ) from error
            raise
        if self._takes_shards:
            return
        for p in self.param_groups[-1]["params"]:
            if is_sharded(p):
                raise TypeError(f"{type(self).__name__}: {WHOLE}, got a DTensor of placements {p.placements}")

    @outside_inference_mode
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Returns what copy.deepcopy makes by itself."""
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    @outside_inference_mode
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state as every torch optimizer does, but keeps its dtype: under bfloat16 parameters factors are float32.

        Raises:
            ValueError: the state is of another optimizer or of other parameters; nothing has changed.
        """
        seen: list[dict[str, Any]] = []  # after the pre-hooks

        def examine(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
            self._check_state_dict(given)
            seen.append(given)

        last = self.register_load_state_dict_pre_hook(examine)
        first = self.register_load_state_dict_post_hook(lambda _: self._restore(seen[0]), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            first.remove()

    def _shapes(self, p: Tensor, state: dict[str, Any]) -> dict[str, tuple[int, ...] | None] | None:
        """Returns what a saved state of a parameter may hold, by name: a tensor's shape, or None for what has none of its own.

        Within dictionaries other names may stand, too. None: the optimizer checks by itself.
        """
        return None

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError where a state is not one of such an optimizer, by its keys and shapes."""
        name = f"{type(self).__name__}.load_state_dict()"
        for group in state_dict["param_groups"]:
            if missing := [key for key in self._group_keys if key not in group]:
                raise ValueError(
                    f"{name}: expected the state of this kind of optimizer, got one whose param_groups have no "
                    f"{', '.join(missing)}"
                )
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        # Not strict: torch refuses other numbers of parameters itself.
        for position, (i, p) in enumerate(zip(saved, self._parameters(), strict=False)):
            state = state_dict["state"].get(i, {})
            shapes = self._shapes(p, state)
            if shapes is None:
                continue
            if unknown := sorted(map(str, state.keys() - shapes.keys())):
                raise ValueError(f"{name}: expected the state of this kind of optimizer, got one with {', '.join(unknown)}")
            for key, value in _tensors(state):
                expected = shapes.get(key)
                if expected is not None and tuple(value.shape) != expected:
                    raise ValueError(
                        f"{name}: expected {key} of shape {list(expected)} for parameter {position} of shape {list(p.shape)}, "
                        f"got {list(value.shape)}; it is the state of another model"
                    )

    def _restore(self, state_dict: dict[str, Any]) -> None:
        """Takes the state once more, in its own dtype and without sharing memory with `state_dict`."""
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(saved, self._parameters(), strict=True):
            if i in state_dict["state"]:
                self.state[p] = tree_map(
                    lambda leaf, p=p: leaf.to(device_for(leaf.dtype, p), copy=True) if isinstance(leaf, Tensor) else leaf,
                    state_dict["state"][i],
                )

    def _refuse_capture(self) -> None:
        """Raises where a step is captured in a CUDA graph: each replay would repeat what Python decides and counts in it."""
        if captured_now():
            raise RuntimeError(
                f"{type(self).__name__}.step(): expected no capture of a CUDA graph, whose replays would repeat this step's "
                f"count, learning rate and decisions; {self._instead_of_capture}"
            )

    def _check_captured_rates(self) -> None:
        """Raises where replays of a CUDA graph that captures a step would not follow a learning rate that changes."""
        for group in self.param_groups:
            lr = group["lr"]
            if self._on_device(lr) or not ("initial_lr" in group or isinstance(lr, Tensor)):
                continue
            got = f"one on {lr.device}" if isinstance(lr, Tensor) else f"{lr!r}"
            raise RuntimeError(
                f"{type(self).__name__}.step(): expected an lr that is a tensor on the parameters' device where a scheduler or "
                "the loop changes it and a CUDA graph captures the step, whose replays repeat what is read elsewhere, got "
                f"{got}; make the optimizer with lr=torch.tensor(..., device=...), or give the group such a tensor"
            )

    def _on_device(self, lr: Any) -> bool:
        """Tells whether a captured step reads this learning rate on the device."""
        return isinstance(lr, Tensor) and lr.device == self._first_parameter().device

    def _warn_once(self, kind: str, message: str) -> None:
        """Gives a warning, unless this optimizer has given one of its kind before."""
        given: set[str] = self.__dict__.setdefault("_warned", set())
        if kind not in given:
            given.add(kind)
            warn(message)

    def _parameters(self) -> list[Tensor]:
        """Returns the parameters of all groups."""
        return [p for group in self.param_groups for p in group["params"]]

    def _first_parameter(self) -> Tensor:
        """Returns the first parameter, whose state may hold that of all."""
        first: Tensor = next(p for group in self.param_groups for p in group["params"])
        return first

    def _maximize(self) -> bool:
        """Tells whether the loss is maximised: one answer for all groups, for one loss."""
        for group in self.param_groups:
            check_flags(f"{type(self).__name__}.step()", {"maximize": group["maximize"]})
        maximize = {group["maximize"] for group in self.param_groups}
        if len(maximize) > 1:
            raise ValueError(f"{type(self).__name__}.step(): expected maximize to be the same in all param_groups")
        return maximize.pop()


def leave_group(p: Tensor, groups: list[dict[str, Any]]) -> None:
    """Takes a parameter out of the param_group that it is in, if any."""
    for group in groups:
        for i, each in enumerate(group["params"]):
            if each is p:
                del group["params"][i]
                if "param_names" in group:
                    del group["param_names"][i]
                break


def _tensors(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Returns the tensors of a parameter's state by their names, also those within dictionaries."""
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield key, value
        elif isinstance(value, dict):
            yield from _tensors(value)
