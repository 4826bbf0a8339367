"""EigenAdam's parameters as matrices, a state for each of them, and how states are saved and loaded."""

from collections.abc import Mapping
from operator import ge
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import ParamsT

from secondorder._tensors import is_sharded
from secondorder.optim._eigen.matrices import Matrix, find_matrices
from secondorder.optim._eigen.rates import check_group
from secondorder.optim._eigen.replays import EigenReplays
from secondorder.optim._eigen.saved import as_kept, with_room
from secondorder.optim._eigen.sharded_state import new_sharded_state
from secondorder.optim._eigen.shards import Shards, found_shards
from secondorder.optim._eigen.state import (
    FIRST_STEPS,
    SHARED,
    basis_sizes,
    cast_state,
    fits_matrix,
    forget_state,
    has_no_bases,
    is_current,
    new_control,
    new_state,
)  # fmt: skip
from secondorder.optim._optimizer import SecondOrderOptimizer

MANY_ROWS = 256  # of a layer's inputs: from here on its bases have twice as many directions


class MatrixOptimizer(SecondOrderOptimizer):
    """An optimizer whose parameters are matrices, each with EigenAdam's state.

    Args:
        params: the parameters or param_groups.
        defaults: the numbers of groups that have none of their own.
        model: the model that the parameters are of, or None.
        rank: how many directions a basis has; None: 8 or 16, by the inputs.
        renew_every: the bases are renewed at every `renew_every`-th step.
    """

    _process_group: dist.ProcessGroup | None  # the ranks that DDP averages gradients over
    _takes_shards = True
    # What copies and pickles have beside groups and state.
    _copied: ClassVar[tuple[str, ...]] = ("_model", "_rank", "_renew_every")

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        model: nn.Module | None,
        rank: int | None,
        renew_every: int,
    ):
        self._rank, self._renew_every = rank, renew_every
        self._reset()
        self._model: nn.Module | None = None
        if model is not None:
            self._model, self._process_group = _unwrapped(model)
        super().__init__(params, defaults)

    def _reset(self) -> None:
        """Sets up what copies and pickles do not have, since it is found anew or belongs to one process."""
        self._process_group = None
        self._shards: Shards | None = None  # the ranks that share the rows of DTensor parameters
        self._matrices: list[Matrix] = []  # of all groups' parameters; none before the first call of a model with lazy layers
        self._parameter_ids: list[list[int]] = []  # of the groups, as they were when the matrices were found; none before
        self._groups_of: dict[Matrix, tuple[int, int]] = {}  # the positions of the groups of its weight and of its bias
        self._replays = EigenReplays(type(self).__name__)

    # --- the matrices --------------------------------------------------------------------------------------------------------

    def _find_anew(self, states: Mapping[Tensor, dict[str, Any]] | None = None) -> None:
        """Finds the matrices of the present parameters; none before the first call of a model with lazy layers.

        Args:
            states: the states of weights that are about to take the place of the present ones, if any.
        """
        self._matrices, self._parameter_ids = [], []
        parameters = self._parameters()
        if any(isinstance(p, nn.UninitializedParameter) for p in parameters):
            return
        self._shards = self._found_shards()
        self._matrices = find_matrices(parameters, self._model, self.state if states is None else states)
        self._parameter_ids = self._present_ids()
        group_of = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        self._groups_of = {m: (group_of[m.weight], group_of[m.weight if m.bias is None else m.bias]) for m in self._matrices}
        for matrix in self._matrices:
            if not matrix.layers and has_no_bases(self.state.get(matrix.weight, {})):
                matrix.has_bases = False  # its first gradient has shown that it is no map
            if states is None:
                self._drop_unfit_state(matrix)

    def _drop_unfit_state(self, matrix: Matrix) -> None:
        """Drops states that were made before the layer was changed, as by pruning, or its bias came into or left the groups."""
        state = self.state.get(matrix.weight, {})
        if "basis_out" in state and not fits_matrix(matrix, state):
            forget_state(state)
            self._replays = EigenReplays(type(self).__name__)  # CUDA graphs have the old tensors
        if matrix.bias is not None:
            forget_state(self.state.get(matrix.bias, {}), "step")

    def _present_ids(self) -> list[list[int]]:
        """Returns the identities of the groups' parameters."""
        return [list(map(id, group["params"])) for group in self.param_groups]

    # --- the ranks -----------------------------------------------------------------------------------------------------------

    def _found_shards(self) -> Shards | None:
        """Returns the ranks that share the rows of the parameters, if any."""
        return found_shards(type(self).__name__, self._parameters(), self._model)

    @property
    def _is_distributed(self) -> bool:
        """Tells whether several processes have inputs."""
        return self._shards is not None or (self._process_group is not None and dist.get_world_size(self._process_group) > 1)

    def _all_reduce_(self, t: Tensor) -> None:
        """Sums a tensor over all processes that have inputs, in place."""
        if self._shards is not None:
            self._shards.all_reduce_(t)
        else:
            dist.all_reduce(t, group=self._process_group)

    # --- the states ----------------------------------------------------------------------------------------------------------

    def _shared_state(self) -> dict[str, Any]:
        """Returns the first parameter's state, which has what belongs to all: control (see `ops.eigen_step_`), and counts."""
        first = self._first_parameter()
        state = self.state[first]
        if "control" not in state:
            # Another parameter may have been the first before.
            before = next((each for each in self.state.values() if "control" in each), None)
            if before is None:
                before = {"control": new_control(first), "steps": 0, "refused": 0}
            state.update({key: before.pop(key) for key in SHARED if key in before})
        return state

    def _state_of(self, matrix: Matrix, rows: int = 0) -> dict[str, Any]:
        """Returns a matrix' state, and makes it when its inputs or its gradient are first seen.

        Before its first step it is made anew where more inputs show that its bases are to have more directions.

        Args:
            matrix: the matrix.
            rows: how many inputs it sees at a time, 0 if none have been seen.
        """
        state = self.state[matrix.weight]
        made = "basis_out" in state
        if made and not is_current(state, matrix.weight):
            self.state[matrix.weight] = state = cast_state(state, matrix.weight)
        if made and state["step"]:
            return state
        # Ranks must agree, though one of them may see no inputs; and a new optimizer has the shapes of a checkpoint's tensors.
        rank = self._basis_rank(rows >= MANY_ROWS or self._is_distributed)
        if made:
            # A layer that a dry run has called with a few inputs may train on many.
            sizes = len(state["basis_out"]), len(state["basis_in"])
            if not matrix.has_bases or all(map(ge, sizes, basis_sizes(matrix, rank))):
                return state
            forget_state(state)
            self._forget_inputs(matrix)
        new = new_sharded_state if is_sharded(matrix.weight) else new_state
        state.update(new(matrix, rank))
        if matrix.bias is not None:
            self.state[matrix.bias].setdefault("step", 0)  # DCP demands a state of every parameter
        return state

    def _forget_inputs(self, matrix: Matrix) -> None:
        """Forgets what forward passes have shown of a matrix' inputs, since its bases are others now."""

    def _basis_rank(self, many_rows: bool) -> int:
        """Returns how many directions a basis has; `many_rows`: whether its layer sees many inputs at a time."""
        return self._rank or (16 if many_rows else 8)

    def _steps(self) -> int:
        """Returns how many steps have been made."""
        return next((state["steps"] for state in self.state.values() if "steps" in state), 0)

    def _renewal_due(self) -> bool:
        """Returns whether the next step renews bases."""
        steps = self._steps()
        return steps < FIRST_STEPS or steps % self._renew_every == 0

    def _catch_up(self) -> bool:
        """Counts the steps that replays of a CUDA graph have made; returns whether there are new ones."""
        if not self._replays:
            return False
        return self._replays.catch_up(self._shared_state(), self._matrices, self.state, self._renew_every)

    def _settle(self) -> None:
        """Waits until it is known which steps were made, before states are saved or copied."""
        self._catch_up()

    # --- groups and checkpoints ----------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as every torch optimizer does; parameters that were frozen so far move from the group they are in."""
        constructed = bool(self._parameter_ids)
        with self._group_or_nothing():
            super().add_param_group(self._moved(param_group, lambda p: constructed and not self.state.get(p, {}).get("step")))
            check_group(type(self).__name__, self.param_groups[-1])
            self._found_shards()
        if constructed:
            self._find_anew()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state; that of a weight has the same shapes whether it turns out to be a map or not, as DCP demands."""
        self._settle()
        found, weights = super().state_dict(), {matrix.weight: matrix for matrix in self._matrices}
        for group, own in zip(found["param_groups"], self.param_groups, strict=True):
            for i, p in zip(group["params"], own["params"], strict=True):
                if p in weights and i in found["state"]:
                    found["state"][i] = with_room(weights[p], found["state"][i], self._basis_rank(self._is_distributed))
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state as every torch optimizer does, in the dtype that each parameter is computed in.

        Raises:
            ValueError: it is the state of another kind of optimizer, of other parameters, or of an EigenAdam that was made with
                other arguments.
        """
        name = f"{type(self).__name__}.load_state_dict()"
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        known = {i: p for i, p in zip(saved, self._parameters(), strict=False) if state_dict["state"].get(i)}
        self._find_anew({p: state_dict["state"][i] for i, p in known.items()})
        weights = {matrix.weight: matrix for matrix in self._matrices}
        try:
            kept = {i: as_kept(name, weights.get(p), state_dict["state"][i]) for i, p in known.items()}
            super().load_state_dict({**state_dict, "state": {**state_dict["state"], **kept}})
        except BaseException:
            self._find_anew()
            raise

    def _restore(self, state_dict: dict[str, Any]) -> None:
        super()._restore(state_dict)
        self._replays = EigenReplays(type(self).__name__)  # CUDA graphs have the old tensors
        for p in [p for p, state in self.state.items() if "basis_out" in state]:
            self.state[p] = cast_state(self.state[p], p)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state and the arguments of construction, without what `_reset` sets up."""
        self._settle()
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in self._copied}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Finds the matrices of the copy's own model; `load_state_dict` comes here too, with the state alone."""
        super().__setstate__(state)
        if "_matrices" not in self.__dict__:
            self._reset()
            self._find_anew()


def _unwrapped(model: nn.Module) -> tuple[nn.Module, dist.ProcessGroup | None]:
    """Returns the model without the wrappers of torch.compile and DDP, which share its parameters; and DDP's ranks."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    group: dist.ProcessGroup | None = None
    if isinstance(inner, DistributedDataParallel):
        group = inner.process_group
        inner = inner.module
    return getattr(inner, "_orig_mod", inner), group
