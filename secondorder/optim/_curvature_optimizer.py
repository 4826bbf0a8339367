"""What the papers' optimizers share: which layers a model has, the tape on them, gradients, and steps that are all or nothing."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from secondorder._distributed import RankReducer
from secondorder._layers import uncovered
from secondorder._tape import LayerRecord, Tape, TapeOptions
from secondorder._tensors import to_compute_dtype
from secondorder._warnings import warn
from secondorder.criteria.losses import as_criterion
from secondorder.errors import NonFiniteError
from secondorder.optim._amp import restore_scale, unscaling_factor
from secondorder.optim._coverage import fallback_reasons, supported_layers, too_wide
from secondorder.optim._fallback import Fallback
from secondorder.optim._growth import LossGrowth
from secondorder.optim._numbers import NUMBERS, Numbers, check_flags, check_nonfinite, check_numbers
from secondorder.optim._optimizer import WHOLE, SecondOrderOptimizer
from secondorder.optim._recorded import recorded_layers, take_largest_batch

_SHARDED = ("FullyShardedDataParallel", "FSDPModule", "DataParallel")


class CurvatureOptimizer(SecondOrderOptimizer):
    """A torch.optim.Optimizer for a model and a criterion, with a tape on its linear layers.

    Parameters outside of the linear layers that the recorded losses reach get the `fallback`: "sgd" updates them by
    SGD with the momentum, weight decay and learning rate of their group and says so once in a warning; "error" refuses.

    Args:
        model: a module with at least one trainable nn.Linear.
        criterion: a module or a function (output, target) -> scalar loss. The loop calls the module itself, or, for a
            function, `optimizer.criterion`. Parameters of its own get the `fallback`.
        defaults: the param_group values.
        tape: what the tape keeps. Its `widest` is a limit on n_out of a layer, >= 1, since H has n_out^2 numbers. The fallback
            updates wider layers, and a warning names them once. A layer whose output they take gets its empirical Fisher block.
        fallback: "sgd" or "error".
        max_input_dim: layers with more inputs are left to the fallback, >= 1; None: there is no limit.
        maximize: whether to maximise the loss: the whole step, with its curvature, is then that of the negative loss.
        nonfinite: what a step does when it meets NaN or inf: "error" raises `secondorder.NonFiniteError`; "skip" changes nothing
            and counts the step in `skipped_steps`.
        **flags: `decoupled_weight_decay`, of optimizers with either kind of weight decay: whether it shrinks the parameters by
            themselves, rather than being part of the gradient.

    Attributes:
        grad_scaler: the torch.amp.GradScaler in use; needed only where `scaler.unscale_(optimizer)` is called before the step,
            since the curvature must know by how much.
    """

    # What the numbers in param_groups must be.
    _numbers: ClassVar[Numbers] = NUMBERS

    _curvature_name = ""  # of the layers without an obstacle, for repr
    _remedy = "lower lr or raise the damping"  # what helps where the training diverges

    # GradScaler.step then comes here with found_inf and grad_scale as attributes, rather than unscaling the gradients alone.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Tensor] | None,
        defaults: dict[str, Any],
        *,
        tape: TapeOptions,
        fallback: str,
        max_input_dim: int | None = None,
        maximize: bool = False,
        nonfinite: str = "error",
        **flags: bool,
    ):
        name = type(self).__name__
        model = _whole_module(name, model)
        self.criterion = as_criterion(name, criterion)
        check_nonfinite(name, nonfinite)
        ddp = model if isinstance(model, DistributedDataParallel) else None
        called, model = model, model if ddp is None else ddp.module
        names: dict[Tensor, str] = {p: n for n, p in model.named_parameters()}
        layers = supported_layers(name, model)
        own = self._trained_of_criterion(names, by_model=tape.keep_inputs, by_ddp=ddp is not None)
        self._uncovered = uncovered(model) | too_wide(name, layers, tape.widest, max_input_dim)
        self._parameter_names, self._criterion_parameters = names | own, set(own)
        self._fallback = Fallback(name, fallback, self._parameter_names, fallback_reasons(layers, self._uncovered))
        check_numbers(name, defaults, self._numbers)
        flags["maximize"] = maximize
        check_flags(name, flags)
        defaults |= {**flags, "skipped_steps": 0}
        super().__init__([*(p for p in model.parameters() if p.requires_grad), *own], defaults)
        self.grad_scaler: Any = None
        self._model, self._ddp = model, ddp
        self._layers = layers
        self._weight_shapes = {layer: layer.weight.shape for layer in layers}
        self._nonfinite = nonfinite
        self._restarts: dict[nn.Linear, str] = {}  # the layers where the recursion starts anew, and why
        self._used_otherwise: set[nn.Linear] = set()  # layers of whose weight this has been said
        self._growth = LossGrowth(name, self._remedy)
        self._idle: set[Tensor] = set()  # the parameters of layers that had no instance in this step: they stay
        self._called_model, self._tape_options = called, tape
        self._tape = self._new_tape()
        if ddp is None and dist.is_available() and dist.is_initialized():
            self._tape.handles.append(model.register_forward_pre_hook(_refuse_ddp))

    def _new_tape(self) -> Tape:
        return Tape(self._layers, self.criterion, self._tape_options, self._called_model)

    def _trained_of_criterion(self, names: dict[Tensor, str], by_model: bool, by_ddp: bool) -> dict[Tensor, str]:
        """Returns the criterion's own parameters that are trained, with their names; warns where none can be.

        Args:
            names: of the model's parameters.
            by_model: whether steps are those of a quadratic model.
            by_ddp: whether DDP averages the gradients.
        """
        trained = [(p, n) for n, p in self.criterion.named_parameters() if p.requires_grad and p not in names]
        own: dict[Tensor, str] = {p: f"criterion.{n}" for p, n in trained}
        if not own or not (by_model or by_ddp):
            return own
        why = "the quadratic model is one of the model's parameters" if by_model else "DistributedDataParallel averages none"
        warn(
            f"the criterion's own parameters, {', '.join(map(repr, own.values()))}, are not trained by {type(self).__name__}, "
            f"since {why}; give them to an optimizer of their own"
        )
        return {}

    @property
    def _ranks(self) -> RankReducer | None:
        """Returns the other processes whose gradients are averaged with this one's."""
        if self._ddp is None or dist.get_world_size(self._ddp.process_group) == 1:
            return None
        return RankReducer(self._ddp.process_group, next(self._model.parameters()).device)

    def __getstate__(self) -> dict[str, Any]:
        """Returns all but the tape, which hangs on the model's hooks, and what a scheduler has put around `step`."""
        kept = {key: value for key, value in self.__dict__.items() if key not in ("_tape", "step")}
        return {**kept, "_recording": self._tape.recording, "_version": _version()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Lays a tape on the copy's own model; `load_state_dict` comes here too, with the state alone.

        Raises:
            RuntimeError: another version has pickled it, whose optimizers have other attributes.
        """
        recording, version = state.pop("_recording", None), state.pop("_version", "another version")
        if "defaults" in state and version != _version():
            raise RuntimeError(
                f"{type(self).__name__}: expected an optimizer that secondorder {_version()} has pickled, got one of {version}; "
                "load it there, and save optimizer.state_dict(), which later versions load"
            )
        super().__setstate__(state)
        if recording is not None:
            self._tape = self._new_tape()
            self._tape.recording = recording
            take_largest_batch(self._tape, self.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, and with them what the tape recorded for them."""
        super().zero_grad(set_to_none)
        self._tape.clear()

    def remove_hooks(self) -> None:
        """Takes the tape off the model: it is an ordinary module again, and this optimizer can step no more."""
        self._tape.remove()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters of the model, or of the criterion, which leave their group."""
        with self._group_or_nothing():
            super().add_param_group(self._moved(param_group, lambda p: p in self._criterion_parameters))
            self._check_known(self.param_groups[-1]["params"], "add_param_group")

    def _check_known(self, parameters: Iterable[Tensor], method: str) -> None:
        """Raises ValueError where parameters are of neither the model, as it was at construction, nor the criterion."""
        new = [p for p in parameters if p not in self._parameter_names]
        for layer, name in self._layers.items() if new else ():  # a layer may have been given another weight since
            self._parameter_names.update({p: f"{name}.{key}".lstrip(".") for key, p in layer.named_parameters(recurse=False)})
        foreign = sum(p not in self._parameter_names for p in new)
        if foreign:
            raise ValueError(
                f"{type(self).__name__}.{method}(): expected parameters of the model, or of the criterion, that the optimizer "
                f"was made for, got {foreign} others; where modules have been added or replaced since, make a new optimizer"
            )

    @property
    def skipped_steps(self) -> int:
        """Returns how many steps nonfinite="skip" has skipped, or GradScaler, for inf. Part of the state_dict."""
        return int(self.param_groups[0]["skipped_steps"])

    def metrics(self) -> dict[str, float]:
        """Returns numbers worth logging.

        Returns:
            "coverage": the share of all trained numbers that a curvature has covered, rather than the fallback.
            "skipped_steps": how many steps NaN or inf has prevented.
        """
        trained = {p for p in self._parameters() if p.requires_grad}
        stepped = [layer for layer in self._layers if self.state.get(layer.weight, {}).get("step")]
        covered = trained & {p for layer in stepped for p in layer.parameters(recurse=False)}
        numbers = sum(p.numel() for p in trained)
        return {
            "coverage": sum(p.numel() for p in covered) / max(numbers, 1),
            "skipped_steps": float(self.skipped_steps),
        }

    def __repr__(self) -> str:
        """Returns the groups, and which curvature each layer and which parameters the fallback."""
        lines = [super().__repr__()]
        for layer, name in self._layers.items():
            lines.append(f"{name or '(the model)'} ({layer.in_features} -> {layer.out_features}): {self._described(layer)}")
        others = [self._parameter_names[p] for p in self._parameters() if p in self._fallback.warned]
        return "\n".join([*lines, f"fallback (SGD): {', '.join(others)}"] if others else lines)

    def _described(self, layer: nn.Linear) -> str:
        """Returns the curvature of a layer."""
        if not layer.weight.requires_grad:
            return "frozen"
        if layer.weight in self._uncovered or layer.weight in self._fallback.warned:
            return "no curvature"
        if layer in self._restarts:
            return f"empirical Fisher, since its output {self._restarts[layer]}"
        return self._curvature_name

    def _groups(self) -> dict[Tensor, dict[str, Any]]:
        """Returns the param_group of every parameter, once the groups' numbers are known to be valid."""
        for group in self.param_groups:
            name = f"{type(self).__name__}.step()"
            check_numbers(name, group, self._numbers)
            check_flags(name, {key: group[key] for key in ("decoupled_weight_decay",) if key in group})
            self._check_known(group["params"], "step")
        return {p: group for group in self.param_groups for p in group["params"]}

    def _gradients(self) -> dict[Tensor, Tensor]:
        """Returns the gradients of what is minimised, the loss or its negative, with coupled decay; at least in float32."""
        maximize, gradients = self._maximize(), {}
        for group in self.param_groups:
            decay = 0.0 if group.get("decoupled_weight_decay", False) else float(group["weight_decay"])
            for p in group["params"]:
                g = p.grad
                if g is None or p in self._idle:
                    continue
                if g.layout is not torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__}.step(): expected dense gradients, got a sparse one for "
                        f"{self._parameter_names[p]!r}; use sparse=False"
                    )
                g = to_compute_dtype(g)
                if maximize:
                    g = -g
                gradients[p] = g if decay == 0 else g.add(p, alpha=decay)
        return gradients

    @contextmanager
    def _whole_or_nothing(self) -> Iterator[bool]:
        """Makes a step succeed or change nothing; yields whether it is to be taken.

        Undoes what GradScaler did to the gradients and to what was recorded, sees to `maximize`, and handles a
        `NonFiniteError` as `nonfinite` says.
        """
        sign = -1.0 if self._maximize() else 1.0
        unscaling = unscaling_factor(self, self.grad_scaler)
        if unscaling is None:
            self._skip()
            yield False
            return
        factor = sign * unscaling
        try:
            with nullcontext() if factor == 1 else self._tape.rescaled(factor):
                yield True
        except BaseException as error:
            if isinstance(error, NonFiniteError) and self._nonfinite == "skip":
                self._skip()
                return
            restore_scale(self)
            raise

    def _skip(self) -> None:
        """Counts a step that is skipped, and forgets what was recorded for it."""
        for group in self.param_groups:
            group["skipped_steps"] += 1
        self._tape.clear(release=True)

    def _check_gradients(self) -> None:
        """Raises RuntimeError where there are no gradients, or a layer has lost its weight, or has one of another shape."""
        if not any(p.grad is not None for p in self._parameters()):
            name = type(self).__name__
            raise RuntimeError(
                f"{name}.step(): expected gradients, found none; call loss.backward() first. They must be those of "
                "the model's own parameters: a functional_call with others, as for an ensemble under torch.func.vmap, leaves none"
            )
        for layer, layer_name in self._layers.items():
            weight = layer._parameters.get("weight")
            if weight is None:
                raise RuntimeError(
                    f"{type(self).__name__}.step(): layer {layer_name!r} has been given a parametrization, norm or pruning mask "
                    "since the optimizer was made; make the optimizer anew"
                )
            if weight.shape != self._weight_shapes[layer]:
                raise RuntimeError(
                    f"{type(self).__name__}.step(): expected weights of the shapes that they had when the optimizer was made, "
                    f"got {list(weight.shape)} in place of {list(self._weight_shapes[layer])} in layer {layer_name!r}; make the "
                    "optimizer anew"
                )

    def _records(self) -> list[LayerRecord]:
        """Returns the layers that the losses since the last step reach, or an error that says what is missing."""
        records = recorded_layers(type(self).__name__, self._tape)
        self._warn_of_other_uses((record.layer for record in records), self._tape.multiplied)
        return records

    def _warn_of_other_uses(self, layers: Iterable[nn.Linear], multiplied: set[Tensor]) -> None:
        """Warns, once for each, of layers whose weight the loss has multiplied with outside of their calls, too."""
        new = [n for n in layers if n.weight in multiplied and n.weight not in self._uncovered and n not in self._used_otherwise]
        if new:
            self._used_otherwise.update(new)
            names = " and ".join(repr(self._layers[layer]) for layer in new)
            warn(
                f"the loss multiplies with the weights of layers {names} outside of the layers' calls, too, as by "
                "F.linear(h, layer.weight) or h @ layer.weight: the gradient has these products, the curvature has not. Call the "
                "layers themselves, or train with secondorder.EigenAdam."
            )


def _whole_module(owner: str, model: Any) -> nn.Module:
    """Returns a model without torch.compile's wrapper, which shares its parameters and calls it.

    Raises:
        TypeError: it is no module, or is sharded or replicated.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{owner}: expected model to be an nn.Module, got {type(model).__name__}; "
            "pass the model itself, not its parameters. Where a framework makes the optimizer from parameters, as skorch "
            "does, give it a function: optimizer=lambda params, **options: "
            f"secondorder.{owner}(net.module_, net.criterion_, **options)"
        )
    model = getattr(model, "_orig_mod", model)
    if any(cls.__name__ in _SHARDED for module in model.modules() for cls in type(module).__mro__):
        raise TypeError(f"{owner}: {WHOLE}; FSDP's shards, and DataParallel's replicas, are not supported")
    return model


def _version() -> str:
    """Returns the package's version; the package itself is imported after this file."""
    return str(sys.modules[__name__.partition(".")[0]].__version__)


def _refuse_ddp(module: nn.Module, args: Any) -> None:
    """Raises where DDP calls a model whose optimizer does not know of the ranks: a forward pre-hook."""
    if DistributedDataParallel._get_active_ddp_module() is not None:
        raise RuntimeError(
            "secondorder: the model is called by DistributedDataParallel, whose ranks must average the curvature, too, or they "
            "drift apart: make the optimizer for that module, EACG(DistributedDataParallel(model), criterion)"
        )
