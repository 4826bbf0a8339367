"""EigenAdam: Adam in the eigenbasis of the expectation-approximated curvature."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from operator import ge
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from secondorder._layers import linear_layers
from secondorder._tape.hooks import remove_handles
from secondorder._tensors import captured_now, cast, is_sharded
from secondorder._warnings import warn
from secondorder.curvature import Curvature
from secondorder.errors import NonFiniteError
from secondorder.optim._amp import outside_autocast
from secondorder.optim._bias_hessians import BiasHessians, chosen_curvature
from secondorder.optim._eigen_inputs import Sketches
from secondorder.optim._eigen_rates import SLOW, Rates, check_group, rates_and_decays, rates_on_device
from secondorder.optim._eigen_replays import EigenReplays
from secondorder.optim._eigen_saved import as_kept, with_room
from secondorder.optim._eigen_state import (
    FIRST_STEPS,
    LAST_SLOPE,
    OSCILLATIONS,
    REFUSED,
    SHARED,
    SLOPE,
    captured,
    cast_state,
    directions,
    fits,
    forget,
    has_no_basis,
    is_current,
    new_control,
    new_state,
    step_length,
)  # fmt: skip
from secondorder.optim._eigen_step import EigenStep
from secondorder.optim._matrices import (
    InputHook,
    Matrix,
    Operands,
    computed_in,
    input_rows,
    is_plain,
    matrices,
    multiplies,
)  # fmt: skip
from secondorder.optim._numbers import check_arguments, warn_of_short_steps
from secondorder.optim._optimizer import SecondOrderOptimizer, leave_group
from secondorder.optim._sharded import Shards, captured_here, found_shards, new_sharded_state
from secondorder.optim._tables import Lookups, share_of_numbers

MANY_ROWS = 256  # of a layer's inputs: from here on its bases have twice as many directions


class EigenAdam(SecondOrderOptimizer):
    """Applies Adam's rule in the eigenbasis of the expectation-approximated curvature, with a step length that it finds.

    It works with any model, loss and training loop, which call nothing but `zero_grad`, `backward` and `step`. For every matrix
    W [n, p] with inputs h and gradient G = E[delta h^T] it keeps a basis V of the k largest eigen-directions of the centred
    inputs, and a basis U of the k largest of the outputs' side. It renews both at the first five steps, and then at every
    `renew_every`-th, by one power iteration on running averages. A side with at most 2 k + 1 elements has its full basis. The
    bias takes the mean input a out exactly: W h + b = W (h - a) + (b + W a), so that with g, the gradient of the bias, the
    gradient of W is G' = G - g a^T. In the coordinates

        C = U^T [G' V, g],   R = [G' V, g] - U C,   T = U^T G' (I - V V^T),   E = (I - U U^T) G' (I - V V^T)

    each element follows Adam's rule with Nesterov's look-ahead. The normalised parts, taken back to W and b, give the step S, and
    W and b move by lr l S. The step length l rises while the loss of fresh batches still falls along the step before, falls while
    it rises there, and decays with the number of times that it has risen.

    All other parameters (a bias by itself, a norm's weight, an embedding) follow Adam's rule at the same step length. An element
    whose gradient is exactly zero moves by weight decay alone. So a row of an embedding moves only in steps that look it up; if
    a step looks up m of n rows, they move n / m times as far, at most ten times.

    A forward hook on linear layers and convolutions sums up their inputs (at most 4,096 of a call, 1,024 patches of a
    convolution) and keeps none. It sees every call under autograd since the last step, even if its output is not used. Weights
    that are used otherwise (attention's, an LSTM's, those inside a compiled graph) get V from their gradients. The first gradient
    of such a weight tells whether it is no map: a table that a batch indexes, if at least half of its rows are zero (three
    quarters without a model); or numbers that each stand for themselves (deviations, gates, pixels), if the square of the
    gradient's mean is at least half of its mean square. Both follow Adam's rule.

    Args:
        params: a model, whose parameters are all trained; or parameters or param_groups, as torch's optimizers take them.
        lr: what multiplies the step length that is found, >= 0. Schedulers change it as any learning rate; none is needed. With
            0 a parameter counts as one without a gradient.
        model: where `params` are parameters or groups, the model that they are of, so that its layers' inputs are seen. None:
            every parameter with two or more dimensions is a matrix without them.
        betas: the decay of the first and second moments.
        rank: k, the directions of a basis, >= 1. None: 8, and 16 for a layer that sees 256 or more inputs at a time, or
            where several ranks train.
        eps: added to the root of the second moments, relative to the largest root mean square of the parameter's gradient so far.
            So a step does not depend on the scale of the loss.
        weight_decay: shrinks the parameters by lr l weight_decay at each step, apart from the gradient, as AdamW does.
        renew_every: the bases are renewed at every `renew_every`-th step, >= 1. With 1 the step length stays at its start, 0.01:
            where a renewal comes between, the slope along the step before is not known.
        curvature: which matrix U is the basis of. "gradient": E[G' G'^T], which needs no criterion. "pch-abs", "pch-clip",
            "pch-clip-all", "gauss-newton", "kflr", "fisher-mc", "fisher-exact", "fisher-empirical", or a
            `secondorder.curvature.Curvature`: the bias Hessian H of a linear layer, on any scale, from the forward passes before
            steps that renew bases. Layers without one use their gradients: all but linear ones, and those whose weight is shared.
        criterion: with a bias Hessian: a module, or a function (output, target) -> scalar loss to be called as
            `optimizer.criterion`. The loop must compute its loss by it.
        maximize: whether the loss is to be maximised.
        nonfinite: what a step does that meets NaN or inf: "error" raises `NonFiniteError`, "skip" counts it in `skipped_steps`.
            Nothing else changes. On CUDA, where no step waits for the device, the error comes with one of the next steps.
        capturable: whether a CUDA graph may capture steps with the passes before them, once five were made without one. A replay
            makes the step that would be made then, but for the groups' numbers, which stay what they were; a learning rate that
            is a tensor on the parameters' device is read by each replay. For one process, kernels for CUDA, and
            curvature="gradient". After a capture `step` and `state_dict` wait for the device, and replays alone raise no error:
            `skipped_steps` tells.

    Raises:
        ValueError: an argument is out of its range; or DTensors are sharded otherwise than by rows, over one dimension of a mesh.

    Parameters may be DTensors whose rows ranks share, as `torch.distributed.fsdp.fully_shard` has it. A step is then that of one
    process with all batches, and ranks exchange O(k (n + p)) numbers for a matrix; it waits for the device.

    State of a matrix: two moments of n p numbers, as Adam's, and O(k (n + p)) more, in float32 for 16-bit parameters.

    Source: builds on Chen et al., "EA-CG", whose E[h h^T] is a a^T alone; on SOAP (Vyas et al., 2024), Adam in Shampoo's
    eigenbasis, and COSMOS (Liu et al., 2025), which keeps a part of it; the step length is by Kesten's rule (1958).
    """

    _by_rows = True
    _captured_instead = (
        "make the optimizer with capturable=True, or capture forward and backward passes alone, and call step() after each replay"
    )

    def __init__(
        self,
        params: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1.0,
        *,
        model: nn.Module | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        rank: int | None = None,
        eps: float = 1e-7,
        weight_decay: float = 0.0,
        renew_every: int = 5,
        curvature: str | Curvature = "gradient",
        criterion: nn.Module | Callable[..., Tensor] | None = None,
        maximize: bool = False,
        nonfinite: str = "error",
        capturable: bool = False,
    ):
        if isinstance(params, nn.Module):
            check_arguments(type(self).__name__, [("model", model, model in (None, params), "to be given once")])
            model, params = params, list(params.parameters())
        elif not (model is None or isinstance(model, nn.Module)):
            raise TypeError(
                f"{type(self).__name__}: expected model to be an nn.Module, got {type(model).__name__}; several models go into "
                "an nn.ModuleList"
            )
        checks: list[tuple[str, Any, bool, str]] = [
            ("rank", rank, rank is None or (type(rank) is int and rank >= 1), "to be an int >= 1, or None"),
            ("renew_every", renew_every, type(renew_every) is int and renew_every >= 1, "to be an int >= 1"),
            ("nonfinite", nonfinite, nonfinite in ("error", "skip"), "'error' or 'skip'"),
            ("capturable", capturable, not capturable or curvature == "gradient", "False with a bias Hessian's bases"),
        ]
        check_arguments(type(self).__name__, checks)
        if callable(lr):
            raise TypeError(
                f"{type(self).__name__}: expected lr to be a number, got {type(lr).__name__}; EigenAdam(model) needs no "
                "criterion, and takes a model beside parameters as model="
            )
        self._rank, self._renew_every, self._nonfinite, self._capturable = rank, renew_every, nonfinite, capturable
        self._model: nn.Module | None = None
        self._group: dist.ProcessGroup | None = None  # of the ranks that DDP averages gradients over
        self._shards: Shards | None = None  # the ranks that share the rows of DTensor parameters
        if model is not None:
            self._model, self._group = _unwrapped(model)
        self._curvature, self.criterion = chosen_curvature(type(self).__name__, curvature, criterion, self._model)
        self._hooked = True
        self._reset()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        check_group(type(self).__name__, defaults)
        super().__init__(params, defaults)
        warn_of_short_steps(type(self).__name__, lr)
        own = {p for group in self.param_groups for p in group["params"]}
        if model is not None and own.isdisjoint(model.parameters()):
            warn(
                f"{type(self).__name__}: no parameter is one of model's, so that it shows no inputs of theirs. Give the model "
                "whose parameters these are, or leave model out."
            )
        self._hook()

    def _reset(self) -> None:
        """Sets up what copies and pickles do not have: hooks, and what belongs to one run of training."""
        self._hessians: BiasHessians | None = None
        self._handles: list[Any] = []
        weakref.finalize(self, remove_handles, self._handles)
        self._matrices: list[Matrix] | None = None  # None: to be found again
        self._ids: list[list[int]] = []  # of the groups' parameters, from which the matrices were made
        self._places: dict[Matrix, tuple[int, int]] = {}  # the positions of the groups of its weight and of its bias
        self._sketches, self._lookups = Sketches(), Lookups()
        self._seeing: bool | None = None  # whether the next step renews bases; None: not known yet
        self._announced: set[str] = set()  # the warnings that were given
        self._rates = Rates(type(self).__name__)
        # A copy of control on its way from the device, and the event of its arrival.
        self._report: tuple[Tensor, Any] | None = None
        self._replays = EigenReplays(type(self).__name__)

    # --- the model -----------------------------------------------------------------------------------------------------------

    def _hook(self, states: Mapping[Tensor, dict[str, Any]] | None = None) -> None:
        """Finds the matrices of the present parameters, and lays hooks on the layers that show their inputs.

        Args:
            states: the states of weights that are about to take the place of the present ones, if any.
        """
        remove_handles(self._handles)
        self._forget()
        self._matrices = None
        self._table(states)
        if self._hooked:
            hook = InputHook(self)
            if self._model is not None and not self._table():  # with lazy layers it happens at the model's next call
                self._handles.append(self._model.register_forward_pre_hook(hook.lay))
            for matrix in self._table():
                modules = (*matrix.modules, *matrix.lookups)
                self._handles += [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
        self._lay_tape()

    def _lay_tape(self) -> None:
        """Lays a tape on the model's linear layers if bases are to be those of bias Hessians, unless it lies there already."""
        if self._curvature is None or self._model is None or not self._hooked or not self._table():
            self._hessians = None
        elif self._hessians is None or self._hessians.tape.names != linear_layers(self._model):
            assert self.criterion is not None
            self._hessians = BiasHessians(type(self).__name__, self._curvature, self.criterion, self._model)
        self._schedule()

    def _schedule(self) -> None:
        """Makes the tape record the next forward pass if the next step renews bases."""
        if self._hessians is not None:
            self._hessians.tape.recording = self._due()

    def _renewing(self) -> bool:
        """Returns whether this step renews bases: with a tape, what was decided before the forward pass."""
        return self._due() if self._hessians is None else self._hessians.tape.recording

    def remove_hooks(self) -> None:
        """Takes the hooks off the model, which is an ordinary module again; from now on bases come from gradients alone."""
        self._hooked = False
        self._hook()

    def _table(self, states: Mapping[Tensor, dict[str, Any]] | None = None) -> list[Matrix]:
        """Returns the matrices of all groups' parameters; none before the first call of a model with lazy layers.

        Args:
            states: by which they are found if that is to be done; None: the present ones.
        """
        if self._matrices is None:
            own = [p for group in self.param_groups for p in group["params"]]
            if any(isinstance(p, nn.UninitializedParameter) for p in own):
                return []
            self._shards = found_shards(type(self).__name__, own, self._model)
            if self._shards is not None and self._curvature is not None:
                raise ValueError(
                    f"{type(self).__name__}: expected curvature='gradient' with DTensor parameters, got {self._curvature!r}, "
                    "which needs whole weights"
                )
            self._matrices = matrices(own, self._model, self.state if states is None else states)
            self._ids = self._ids_now()
            place = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
            self._places = {m: (place[m.weight], place[m.weight if m.bias is None else m.bias]) for m in self._matrices}
            self._owner: dict[Any, Matrix] = {m.weight: m for m in self._matrices if m.modules or m.lookups}
            for matrix in self._matrices:
                if self._shards is not None:  # layers compute with whole weights, which are other tensors
                    self._owner |= dict.fromkeys((*matrix.modules, *matrix.lookups), matrix)
                if not matrix.modules and has_no_basis(self.state.get(matrix.weight, {})):
                    matrix.eigen = False  # its first gradient has shown that it is no map
                if states is None:
                    self._drop_unfit(matrix)
        return self._matrices

    def _drop_unfit(self, matrix: Matrix) -> None:
        """Drops states that were made before the layer was changed, as by pruning, or its bias came into or left the groups."""
        state = self.state.get(matrix.weight, {})
        if "basis_out" in state and not fits(matrix, state):
            forget(state)
            self._replays = EigenReplays(type(self).__name__)  # CUDA graphs have the old tensors
        if matrix.bias is not None:
            forget(self.state.get(matrix.bias, {}), "step")

    def _ids_now(self) -> list[list[int]]:
        """Returns the identities of the groups' parameters."""
        return [list(map(id, group["params"])) for group in self.param_groups]

    def _see(self, module: nn.Module, inputs: Any, output: Any, captured: bool) -> None:
        """Sketches a layer's inputs if the next step renews bases, or if a CUDA graph captures the call, as replays may."""
        if not (isinstance(output, Tensor) and output.requires_grad):
            return
        if self._seeing is None and not captured:
            self._catch_up()
            self._seeing = self._renewing()
        if not (captured or self._seeing):
            return
        self._sketches.expect(captured)
        ddp = DistributedDataParallel._get_active_ddp_module()
        if ddp is not None:
            self._group = ddp.process_group
        matrix = self._owner.get(module, self._owner.get(module._parameters.get("weight")))
        if matrix is None or not matrix.weight.requires_grad or not is_plain(inputs):
            return
        if captured and not self._replays.ready(matrix, self.state):
            return  # the step will say why
        if matrix.lookups:
            self._lookups.add(matrix, inputs)
            return
        if not multiplies(module):
            return  # it has been given another forward, which may do anything with its input
        rows = cast(input_rows(module, inputs.detach()), computed_in(matrix.weight))
        if rows.shape[1] != matrix.shape[1]:
            return  # the weight has another shape, as the step will say
        state = self._state(matrix, len(rows))
        replay = (self._shared()["control"], self._renew_every) if captured else ()
        self._sketches.add(matrix, state, rows, not (self._several or rows.is_cuda or captured), replay)

    # --- the state -----------------------------------------------------------------------------------------------------------

    @property
    def _first(self) -> Tensor:
        """Returns the first parameter, whose state has what belongs to all."""
        return next(p for group in self.param_groups for p in group["params"])

    def _shared(self) -> dict[str, Any]:
        """Returns the first parameter's state, which has what belongs to all: control (see `ops.eigen_step_`), and counts."""
        state = self.state[self._first]
        if "control" not in state:
            # Another parameter may have been the first before.
            before = next((each for each in self.state.values() if "control" in each), None)
            if before is None:
                before = {"control": new_control(self._first), "steps": 0, "refused": 0}
            state.update({key: before.pop(key) for key in SHARED if key in before})
        return state

    @property
    def _several(self) -> bool:
        """Tells whether several processes have inputs."""
        return self._shards is not None or (self._group is not None and dist.get_world_size(self._group) > 1)

    def _sum_(self, t: Tensor) -> None:
        """Sums a tensor over all processes that have inputs, in place."""
        if self._shards is not None:
            self._shards.sum_(t)
        else:
            dist.all_reduce(t, group=self._group)

    def _steps(self) -> int:
        """Returns how many steps have been made."""
        return next((state["steps"] for state in self.state.values() if "steps" in state), 0)

    def _due(self) -> bool:
        """Returns whether the next step renews bases."""
        steps = self._steps()
        return steps < FIRST_STEPS or steps % self._renew_every == 0

    def _state(self, matrix: Matrix, rows: int) -> dict[str, Any]:
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
        rank = self._directions(rows >= MANY_ROWS or self._several)
        if made:
            # A layer that a dry run has called with a few inputs may train on many.
            present = len(state["basis_out"]), len(state["basis_in"])
            if not matrix.eigen or all(map(ge, present, directions(matrix, rank))):
                return state
            forget(state)
            self._sketches.of.pop(matrix, None)
        new = new_sharded_state if is_sharded(matrix.weight) else new_state
        state.update(new(matrix, rank))
        if matrix.bias is not None:
            self.state[matrix.bias].setdefault("step", 0)  # DCP demands a state of every parameter
        return state

    def _directions(self, many: bool) -> int:
        """Returns how many directions a basis has; `many`: whether its layer sees many inputs at a time."""
        return self._rank or (16 if many else 8)

    def _catch_up(self) -> None:
        """Counts the steps that replays of a CUDA graph have made, and forgets inputs that were seen before those."""
        if self._replays and self._replays.catch_up(self._shared(), self._table(), self.state, self._renew_every):
            self._forget()  # sketches are sums along bases that may be others now

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state and the arguments of construction, without the hooks."""
        self._catch_up()
        own = ("_model", "_curvature", "criterion", "_rank", "_renew_every", "_nonfinite", "_capturable", "_hooked")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Lays hooks on the copy's own model; `load_state_dict` comes here too, with the state alone."""
        super().__setstate__(state)
        if "_handles" not in self.__dict__:
            self._group = self._shards = None
            self._reset()
            self._hook()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state; that of a weight has the same shapes whether it turns out to be a map or not, as DCP demands."""
        self._catch_up()
        found, weights = super().state_dict(), {matrix.weight: matrix for matrix in self._table()}
        for group, own in zip(found["param_groups"], self.param_groups, strict=True):
            for i, p in zip(group["params"], own["params"], strict=True):
                if p in weights and i in found["state"]:
                    found["state"][i] = with_room(weights[p], found["state"][i], self._directions(self._several))
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state as every torch optimizer does, in the dtype that each parameter is computed in.

        Raises:
            ValueError: it is the state of another kind of optimizer, of other parameters, or of an EigenAdam that was made with
                other arguments.
        """
        name = f"{type(self).__name__}.load_state_dict()"
        own = [p for group in self.param_groups for p in group["params"]]
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        known = {i: p for i, p in zip(saved, own, strict=False) if state_dict["state"].get(i)}
        self._hook({p: state_dict["state"][i] for i, p in known.items()})
        weights = {matrix.weight: matrix for matrix in self._table()}
        try:
            kept = {i: as_kept(name, weights.get(p), state_dict["state"][i]) for i, p in known.items()}
            super().load_state_dict({**state_dict, "state": {**state_dict["state"], **kept}})
        except BaseException:
            self._hook()
            raise
        self._seeing, self._replays = None, EigenReplays(type(self).__name__)  # CUDA graphs have the old tensors
        self._schedule()

    def _restore(self, state_dict: dict[str, Any]) -> None:
        super()._restore(state_dict)
        for p in [p for p, state in self.state.items() if "basis_out" in state]:
            self.state[p] = cast_state(self.state[p], p)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as every torch optimizer does; parameters that were frozen so far move from the group they are in."""
        before = [{**group, "params": list(group["params"])} for group in self.param_groups]
        constructed = "_matrices" in self.__dict__ and self._matrices is not None
        params = param_group.get("params") if isinstance(param_group, dict) else None
        if constructed and params is not None and not isinstance(params, set):
            given = list(params) if isinstance(params, Iterable) and not isinstance(params, Tensor) else [params]
            param_group = {**param_group, "params": given}
            for p in (each[1] if isinstance(each, tuple) else each for each in given):
                if isinstance(p, Tensor) and not self.state.get(p, {}).get("step"):
                    leave_group(p, self.param_groups)
        try:
            super().add_param_group(param_group)
            group = self.param_groups[-1]
            check_group(type(self).__name__, group)
            found_shards(type(self).__name__, [p for each in self.param_groups for p in each["params"]], self._model)
        except BaseException:
            self.param_groups[:] = before
            raise
        if constructed:
            self._hook()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, and with them what was recorded for them."""
        super().zero_grad(set_to_none)
        if self._hessians is not None:
            self._hessians.tape.clear()

    # --- the step ------------------------------------------------------------------------------------------------------------

    @outside_autocast
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step from the parameters' gradients.

        Args:
            closure: computes the loss anew and goes backward through it; called once, first.

        Returns:
            The closure's value, or None.

        Raises:
            NonFiniteError: a gradient is NaN or inf, or so large that its square is (nonfinite="error"). Nothing has changed.
            RuntimeError: a gradient is sparse; there is none at the first step (later that is a warning); a CUDA graph is being
                captured, and this step cannot be (see `capturable`); or, with the bias Hessian's bases, no call of the criterion
                was recorded that leads to the gradients.
        """
        if not self._capturable:
            self._refuse_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._step()
        finally:
            self._forget()
            if self._hessians is not None:
                self._hessians.tape.clear(release=True)
                self._schedule()
        if closure is not None:
            self._watch(loss)
        return loss

    def _forget(self) -> None:
        """Forgets what forward passes have shown since the last step."""
        self._sketches.clear()
        self._lookups.clear()
        self._seeing = None

    @torch.compiler.disable  # its bookkeeping has nothing to compile
    def _step(self) -> None:
        name, sign, recorded = f"{type(self).__name__}.step()", -1 if self._maximize() else 1, self._hessians
        numbers = self._rates.read(self.param_groups, self._on_device)
        if self._matrices is None or self._ids_now() != self._ids:
            self._hook()  # a group's list of parameters may have been changed by hand
        present = [m for m in self._table() if m.weight.grad is not None or (m.bias is not None and m.bias.grad is not None)]
        if not present:
            self._find_none()
            return
        if not all(lr for lr, _ in numbers):
            present = self._moving(present, numbers)
            if not present:
                return
        operands = Operands(name, present, sign)
        captured = self._captured(present)
        renewing = captured or self._renewing()
        if not captured:
            self._read_report()
        self._sketches.expect(captured)
        for matrix in present:
            if matrix.could_be_numbers and not self.state[matrix.weight].get("step"):
                self._find_numbers(matrix)
        states, shared = [self._state(matrix, 0) for matrix in present], self._shared()
        replay = (self._renew_every, shared["steps"]) if captured else ()
        step = EigenStep(name, present, states, operands, shared["control"], self._shards, replay)
        shares: dict[Matrix, float] = {}
        if renewing:
            shares = self._lookups.shares(present, states, self._sum_ if self._several else None)
            trained = {p: group for group in self.param_groups for p in group["params"]}
            hessians = {} if recorded is None else recorded.of_step(trained, sign, self._group)
            sketches = self._sketches.averaged(present, self.state, self._sum_) if self._several else self._sketches.of
            self._tell_lost(step.plan_renewal(sketches, hessians))  # where warnings are errors nothing has changed yet
        rates = rates_and_decays(present, states, shares, numbers, self._places)
        places = [self._places[matrix] for matrix in present]
        on_device = rates_on_device(self.param_groups, self._on_device, places, shared["control"])
        step.renew()
        step.move(rates, self.param_groups[0], on_device)
        if captured:
            step.note_captured()
            self._replays.add(present)
        elif self._taken(shared["control"]):
            step.note_made(shares)
            self._count(present)

    def _count(self, present: list[Matrix]) -> None:
        """Counts a step that was made."""
        for matrix in present:
            if matrix.bias is not None:
                self.state[matrix.bias]["step"] = self.state[matrix.weight]["step"]
        shared = self._shared()
        shared["steps"] += 1
        if shared["steps"] == SLOW:
            self._rates.warn_if_slow(self.defaults["lr"])

    def _captured(self, present: list[Matrix]) -> bool:
        """Returns whether a CUDA graph captures this step; if not, brings Python's counts to those of the device.

        Raises:
            RuntimeError: a graph captures a step that cannot be captured.
        """
        captured = self._capturable and captured_now()
        if captured:
            if self._several:
                raise RuntimeError(f"{type(self).__name__}.step(): expected no capture of a CUDA graph where several ranks train")
            self._check_captured_rates()
        if self._capturable:
            self._replays.check(present, self.state, captured)
        if not captured:
            self._catch_up()
        return captured

    def _on_device(self, lr: Any) -> bool:
        """Returns whether the operators read this learning rate on the device, rather than be told its value."""
        return self._capturable and super()._on_device(lr) and self._shards is None

    def _find_none(self) -> None:
        """Raises if no step has found a gradient yet; later, when a batch may have nothing to learn from, warns once."""
        problem = f"{type(self).__name__}.step(): expected gradients, found none"
        if not self._steps():
            raise RuntimeError(
                f"{problem}; call loss.backward() first. The parameters must be those of the loss: a model may have got new ones "
                "since, as by to_empty() or load_state_dict(assign=True)"
            )
        if "none" not in self._announced:
            self._announced.add("none")
            warn(
                f"{problem}, and left all parameters as they are. If the model has got new ones since, as by "
                "load_state_dict(assign=True), make a new optimizer."
            )

    def _moving(self, present: list[Matrix], numbers: list[tuple[float, float]]) -> list[Matrix]:
        """Returns the matrices whose learning rate is not 0: slopes along steps that are not made would lengthen others."""
        moving = [matrix for matrix in present if any(numbers[place][0] for place in self._places[matrix])]
        self._shared()
        for matrix in present:  # DCP makes a step with a learning rate of 0 before it loads their states
            self._state(matrix, 0)
        return moving

    def _find_numbers(self, matrix: Matrix) -> None:
        """Decides by a matrix' first gradient whether it is a map, or numbers that each stand for themselves."""
        # Without a model this looks at every layer's weight, and an instance leaves half of a layer's ReLUs idle.
        most = 0.25 if self._model is None else 0.5
        share = share_of_numbers(matrix, most, self._sum_ if is_sharded(matrix.weight) else None)
        if matrix.eigen != (share is None):
            matrix.eigen = share is None
            forget(self.state[matrix.weight])  # what a step that was refused has left
        if share is not None and share < 1:
            self._state(matrix, 0)["share"] = share

    def _tell_lost(self, lost: list[str]) -> None:
        """Warns once of layers whose inputs are not seen."""
        if lost and "unseen" not in self._announced:
            self._announced.add("unseen")
            warn(
                f"{type(self).__name__} sees no inputs of {', '.join(lost)}: the layers run in a compiled graph or under "
                "torch.func, have been pruned, parametrized or given another forward since the optimizer was made, or are not "
                "called as modules. Their bases are those of their gradients."
            )

    def _taken(self, control: Tensor) -> bool:
        """Returns whether the step was made; on CUDA it takes that for granted, and `_read_report` learns the truth later.

        Raises:
            NonFiniteError: it was not made, with nonfinite="error".
        """
        if control.is_cuda and self._shards is None:  # ranks that share rows wait for each other, and all raise at once
            copy = torch.empty(control.shape, dtype=control.dtype, device="cpu", pin_memory=True).copy_(
                control, non_blocking=True
            )
            event = torch.cuda.Event()
            event.record()
            self._report = copy, event
            return True
        return self._heed(control.tolist())

    def _read_report(self) -> None:
        """Learns on CUDA whether a step before this one was made, if the device has told by now."""
        if self._replays:  # replays send no report
            self._report = None
            self._heed(self._shared()["control"].tolist())
        elif self._report is not None and self._report[1].query():
            entries, self._report = self._report[0].tolist(), None
            shared = self._shared()
            refused = int(entries[REFUSED]) - shared["refused"]
            for state in self.state.values() if refused else ():  # they were counted as made
                state.update({key: state[key] - refused for key in ("step", "steps") if state.get(key, 0) >= refused})
            self._heed(entries)

    def _heed(self, entries: list[float]) -> bool:
        """Returns whether no step was refused since the last look at control, of which these are the entries.

        Raises:
            NonFiniteError: a step was refused, with nonfinite="error".
        """
        state = self._shared()
        refused = int(entries[REFUSED]) - state["refused"]
        if not refused:
            return True
        state["refused"] += refused
        if self._nonfinite == "error":
            rates = any(self._on_device(group["lr"]) for group in self.param_groups)  # which no step reads on the host
            raise NonFiniteError(
                f"{type(self).__name__}.step(): expected finite gradients, got NaN or inf, or numbers whose squares are"
                f"{', or a learning rate that is negative or not finite' if rates else ''}; no parameter and no state has changed"
            )
        return False

    def _watch(self, loss: Any) -> None:
        """Warns once if a closure's loss has grown to more than a thousand times the first one."""
        if "growth" in self._announced or self._maximize():
            return
        if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_cuda:
            loss = loss.item()
        if not isinstance(loss, float):
            return
        shared = self._shared()
        if abs(loss) > 1000 * shared.setdefault("first_loss", abs(loss)) > 0:
            self._announced.add("growth")
            warn(
                f"{type(self).__name__}: the loss has grown from {shared['first_loss']:.3g} to {loss:.3g}: training diverges. "
                "Lower lr, or clip the gradients."
            )

    @property
    def skipped_steps(self) -> int:
        """Returns how many steps were not made since a gradient was not finite. Part of the state_dict; waits for the device."""
        return int(self._shared()["control"][REFUSED])

    def metrics(self) -> dict[str, float]:
        """Returns numbers worth logging. Waits for the device; a step does not compute them.

        Returns:
            "length": the step length, without lr. "slope": the average slope along the present step, per step length.
            "slope_ratio": the slope along the step before over "slope", -1 to 1 or so: above 0.1 steps grow, below -0.6 they
            shrink. "oscillations": how many steps had a negative slope along the step before. "rank": how many directions the
            bases of matrices have, the mean over their sides. "coverage": the share of all numbers with a gradient so far that
            belong to matrices with bases, rather than follow Adam's rule. "seen": the share of these matrices whose inputs the
            last renewal has seen. "captured": the share of a gradient's mean square that lies in the basis of either side, the
            mean over these matrices. "skipped_steps": how many steps were not made. All but "length" are 0 before the first
            step.
        """
        entries = self._shared()["control"].tolist()
        met = [
            (matrix, self.state[matrix.weight]) for matrix in self._table() if "basis_out" in self.state.get(matrix.weight, {})
        ]
        of = [(matrix, state) for matrix, state in met if matrix.eigen]
        ranks = [len(state[side]) for _, state in of for side in ("basis_out", "basis_in")]
        known = [captured_here(*each) if self._shards is not None else captured(*each) for each in of]
        shares = [share for share in known if share is not None]
        return {
            "length": step_length(entries),
            "slope": entries[SLOPE],
            "slope_ratio": entries[LAST_SLOPE] / (abs(entries[SLOPE]) or 1.0),
            "oscillations": entries[OSCILLATIONS],
            "rank": sum(ranks) / max(len(ranks), 1),
            "coverage": sum(matrix.numel for matrix, _ in of) / max(sum(matrix.numel for matrix, _ in met), 1),
            "seen": sum(state["renewals"] > 0 and not state["unseen"] for _, state in of) / max(len(of), 1),
            "captured": float(torch.stack(shares).mean()) if shares else 0.0,
            "skipped_steps": entries[REFUSED],
        }


def _unwrapped(model: nn.Module) -> tuple[nn.Module, dist.ProcessGroup | None]:
    """Returns the model without the wrappers of torch.compile and DDP, which share its parameters; and DDP's ranks."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    group: dist.ProcessGroup | None = None
    if isinstance(inner, DistributedDataParallel):
        group = inner.process_group
        inner = inner.module
    return getattr(inner, "_orig_mod", inner), group
