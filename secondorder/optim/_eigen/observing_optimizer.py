"""What forward passes show EigenAdam: the inputs of layers, lookups in tables, and bias Hessians where bases are theirs."""

import contextlib
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import ParamsT

from secondorder._layers import linear_layers
from secondorder._tape.hooks import remove_handles
from secondorder._tensors import captured_now, cast
from secondorder.curvature import Curvature
from secondorder.optim._eigen.bias_hessians import BiasHessians, chosen_curvature
from secondorder.optim._eigen.layer_inputs import input_rows, is_plain
from secondorder.optim._eigen.matrices import Matrix, computed_in, multiplies
from secondorder.optim._eigen.matrix_optimizer import MatrixOptimizer
from secondorder.optim._eigen.shards import Shards
from secondorder.optim._eigen.sketches import Sketch, Sketches
from secondorder.optim._eigen.tables import Lookups
from secondorder.optim._recorded import note_largest_batch, take_largest_batch


class ObservingOptimizer(MatrixOptimizer):
    """A `MatrixOptimizer` that sees the inputs of its model's layers, by forward hooks, before steps that renew bases.

    Args:
        params: the parameters or param_groups.
        defaults: the numbers of groups that have none of their own.
        model: the model that the parameters are of, or None.
        rank: how many directions a basis has; None: 8 or 16, by the inputs.
        renew_every: the bases are renewed at every `renew_every`-th step.
        curvature: "gradient", or whose bias Hessians have bases on the outputs' side.
        criterion: what the loop computes its loss by, with a bias Hessian.
        capturable: whether inputs are seen in what a CUDA graph captures.
    """

    _copied = (*MatrixOptimizer._copied, "_curvature", "criterion", "_capturable", "_hooked")

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        model: nn.Module | None,
        rank: int | None,
        renew_every: int,
        curvature: str | Curvature,
        criterion: nn.Module | Callable[..., Tensor] | None,
        capturable: bool,
    ):
        self._curvature, self.criterion = chosen_curvature(type(self).__name__, curvature, criterion, model)
        self._capturable, self._hooked = capturable, True
        super().__init__(params, defaults, model=model, rank=rank, renew_every=renew_every)

    def _reset(self) -> None:
        super()._reset()
        self._hessians: BiasHessians | None = None
        self._handles: list[Any] = []
        weakref.finalize(self, remove_handles, self._handles)
        self._matrix_of: dict[Any, Matrix] = {}  # by its weight; by its modules where these compute with other tensors
        self._sketches, self._lookups = Sketches(), Lookups()
        self._observing: bool | None = None  # whether the next step renews bases; None: not known yet

    def _found_shards(self) -> Shards | None:
        shards = super()._found_shards()
        if shards is not None and self._curvature is not None:
            raise ValueError(
                f"{type(self).__name__}: expected curvature='gradient' with DTensor parameters, got {self._curvature!r}, "
                "which needs whole weights"
            )
        return shards

    # --- hooks ---------------------------------------------------------------------------------------------------------------

    def _find_anew(self, states: Mapping[Tensor, dict[str, Any]] | None = None) -> None:
        """Finds the matrices of the present parameters, and installs hooks on the modules that show their inputs."""
        remove_handles(self._handles)
        self._forget_passes()
        super()._find_anew(states)
        matrices = [matrix for matrix in self._matrices if matrix.modules]
        self._matrix_of = {matrix.weight: matrix for matrix in matrices}
        if self._shards is not None:  # layers compute with whole weights, which are other tensors
            self._matrix_of |= {module: matrix for matrix in matrices for module in matrix.modules}
        if self._hooked:
            hook = InputHook(self)
            if self._model is not None and not self._matrices:  # the model has lazy layers
                self._handles.append(self._model.register_forward_pre_hook(hook.install))
            for matrix in matrices:
                self._handles += [module.register_forward_hook(hook, with_kwargs=True) for module in matrix.modules]
        self._lay_tape()

    def _lay_tape(self) -> None:
        """Lays a tape on the model's linear layers if bases are to be those of bias Hessians, unless it lies there already."""
        if self._curvature is None or self._model is None or not self._hooked or not self._matrices:
            self._hessians = None
        elif self._hessians is None or self._hessians.tape.names != linear_layers(self._model):
            assert self.criterion is not None
            if self._hessians is not None:
                note_largest_batch(self._hessians.tape, self.param_groups)
            self._hessians = BiasHessians(type(self).__name__, self._curvature, self.criterion, self._model)
            take_largest_batch(self._hessians.tape, self.param_groups)
            note_largest_batch(self._hessians.tape, self.param_groups)
        self._schedule_recording()

    def _schedule_recording(self) -> None:
        """Makes the tape record the next forward pass if the next step renews bases."""
        if self._hessians is not None:
            self._hessians.tape.recording = self._renewal_due()

    def remove_hooks(self) -> None:
        """Takes the hooks off the model, which is an ordinary module again; from now on bases come from gradients alone."""
        self._hooked = False
        self._find_anew()

    # --- what they show ------------------------------------------------------------------------------------------------------

    def _observe(self, module: nn.Module, inputs: Any, output: Any, captured: bool) -> None:
        """Sketches a layer's inputs if the next step renews bases, or if a CUDA graph captures the call, as replays may."""
        if not (isinstance(output, Tensor) and output.requires_grad):
            return
        if self._observing is None and not captured:
            self._catch_up()
            self._observing = self._renews_now()
        if not (captured or self._observing):
            return
        self._sketches.expect(captured)
        ddp = DistributedDataParallel._get_active_ddp_module()
        if ddp is not None:
            self._process_group = ddp.process_group
        matrix = self._matrix_of.get(module, self._matrix_of.get(module._parameters.get("weight")))
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
        state = self._state_of(matrix, len(rows))
        alone = not (self._is_distributed or rows.is_cuda or captured)
        control, renew_every = (self._shared_state()["control"], self._renew_every) if captured else (None, 0)
        self._sketches.add(matrix, state, rows, alone, control, renew_every)

    def _renews_now(self) -> bool:
        """Returns whether this step renews bases: with a tape, what was decided before the forward pass."""
        return self._renewal_due() if self._hessians is None else self._hessians.tape.recording

    def _sketches_of(self, matrices: list[Matrix]) -> Mapping[Matrix, Sketch]:
        """Returns the sketches of these matrices' inputs, over all processes."""
        if not self._is_distributed:
            return self._sketches.by_matrix
        return self._sketches.averaged(matrices, self.state, self._all_reduce_)

    def _forget_passes(self) -> None:
        """Forgets what forward passes have shown since the last step."""
        self._sketches.clear()
        self._lookups.clear()
        self._observing = None

    def _forget_inputs(self, matrix: Matrix) -> None:
        self._sketches.drop(matrix)

    def _catch_up(self) -> bool:
        caught_up = super()._catch_up()
        if caught_up:
            self._forget_passes()  # sketches are sums along bases that may be others now
        return caught_up

    def state_dict(self) -> dict[str, Any]:
        """Returns the state; that of a weight has the same keys before and after its first bias Hessian, as DCP demands."""
        if self._hessians is not None:
            note_largest_batch(self._hessians.tape, self.param_groups)
        found = super().state_dict()
        for state in found["state"].values() if self._curvature is not None else ():
            if "basis_out" in state:
                state.setdefault("curved", False)
        return found

    def _restore(self, state_dict: dict[str, Any]) -> None:
        super()._restore(state_dict)
        if self._hessians is not None:
            take_largest_batch(self._hessians.tape, self.param_groups)
        self._observing = None
        self._schedule_recording()

    def __getstate__(self) -> dict[str, Any]:
        """Returns what copies and pickles have."""
        if self._hessians is not None:
            note_largest_batch(self._hessians.tape, self.param_groups)
        return super().__getstate__()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, and with them what was recorded for them."""
        super().zero_grad(set_to_none)
        if self._hessians is not None:
            self._hessians.tape.clear()


class InputHook:
    """A forward hook (with_kwargs=True) that shows a module's input to an optimizer, which it does not keep alive.

    Copies of the module are another net's, and its files are read without this package: there it is a method of Python's own
    that does nothing.
    """

    def __init__(self, optimizer: ObservingOptimizer):
        self._optimizer = weakref.ref(optimizer)

    @property
    def __name__(self) -> str:  # what torch.jit.script asks for
        raise AttributeError(
            "the optimizer's forward hooks cannot be scripted: call optimizer.remove_hooks() before torch.jit.script(model)"
        )

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        """Shows the input; `rest`: the keywords and the output, or the output alone, as where quantization copies the hook."""
        if torch.compiler.is_compiling():
            return
        optimizer = self._optimizer()
        # Before most steps there is nothing to observe, and small layers cost no more than these questions.
        capturable = optimizer is not None and optimizer._capturable
        if optimizer is None or (optimizer._observing is False and not capturable) or torch.jit.is_tracing():
            return
        captured = captured_now()
        keywords = rest[0] if len(rest) > 1 else {}
        if capturable or not captured:
            optimizer._observe(module, args[0] if args else keywords.get("input"), rest[-1], captured)

    def install(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Installs the hooks once the parameters of a model with lazy layers are known: a forward pre-hook of the model."""
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer._find_anew()

    def __reduce__(self) -> tuple[Any, ...]:  # also what copy.deepcopy goes by
        return getattr, (contextlib.nullcontext(), "__exit__")
