"""EigenAdam: Adam in the eigenbasis of the expectation-approximated curvature."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from secondorder import ops
from secondorder._tape.hooks import remove_handles
from secondorder._tensors import compute_dtype
from secondorder._warnings import warn
from secondorder.errors import NonFiniteError
from secondorder.optim._matrices import InputHook, Matrix, input_rows, matrices
from secondorder.optim._numbers import Numbers, check_arguments, check_numbers
from secondorder.optim._optimizer import SecondOrderOptimizer

_NUMBERS: Numbers = {
    "lr": (lambda v: 0 <= v < float("inf"), ">= 0"),
    "weight_decay": (lambda v: 0 <= v < float("inf"), ">= 0"),
    "eps": (lambda v: 0 <= v < float("inf"), ">= 0"),
}
_LENGTH, _OSCILLATIONS, _SLOPE, _LAST_SLOPE, _STEPS, _REFUSED, _UNRENEWED, _START = range(len(ops.CONTROL))

FIRST = 5  # steps at each of which bases are renewed
DECAY = 0.9  # of the averages behind a basis, from one renewal to the next
MANY_ROWS = 256  # of a layer's inputs: from here on its bases have twice as many directions
SAMPLED = 4096  # elements of what has no basis, whose slopes stand for all


class EigenAdam(SecondOrderOptimizer):
    """Adam in the eigenbasis of the expectation-approximated curvature, with a step length that it finds.

    For any model, loss and training loop: nothing is called but `zero_grad`, `backward` and `step`. Every matrix W [n, p] with
    inputs h and gradient G = E[delta h^T] has a basis V of its centred inputs' largest eigen-directions and a basis U of its
    outputs', k of each, renewed at the first five steps and then at every `renew_every`-th by one power iteration on running
    averages. The mean input a is taken out exactly, through the bias: W h + b = W (h - a) + (b + W a), so that the gradient is
    G' = G - g a^T, g that of the bias. In the coordinates

        C = U^T [G' V, g],   R = [G' V, g] - U C,   T = U^T G' (I - V V^T),   E = (I - U U^T) G' (I - V V^T)

    each element follows Adam's rule with Nesterov's look-ahead; the normalised parts go back to W and b, which move by
    lr l S, l the step length that is found: it rises where fresh batches still have a slope along the step before, falls where
    they have the opposite one, and decays with the number of times that they have had it. A side with at most 2 k + 1 elements
    has its full basis. What is no matrix, as a bias by itself, a norm's weight or an embedding, follows Adam's rule at the same
    step length. A parameter whose gradient is exactly zero does not move.

    Linear layers and convolutions show their inputs (of a convolution at most 1,024 patches) by a forward hook, which sums
    them up and keeps none. Weights that are used otherwise (attention's, an LSTM's, those inside a compiled graph) have V from
    their gradients, too.

    Args:
        params: a model, all of whose parameters are trained, or parameters, or param_groups, as torch's optimizers take them.
        lr: what multiplies the step length that is found, >= 0. Schedulers change it as any learning rate; none is needed.
        model: where `params` are parameters or groups, the model that they are of, so that its layers' inputs are seen. None:
            every parameter with two or more dimensions is a matrix without them.
        betas: the decay of the first and second moments.
        rank: k. None: 8, and 16 for a layer that sees 256 or more inputs at a time.
        eps: added to the root of the second moments, relative to the largest root mean square of the parameter's gradient so far,
            which makes a step independent of the loss' scale.
        weight_decay: shrinks the parameters by lr l weight_decay at each step, apart from the gradient, as AdamW does.
        renew_every: bases are renewed at every so-many-th step.
        maximize: whether the loss is to be maximised.
        nonfinite: what a step does that meets NaN or inf: "error" raises `NonFiniteError`, "skip" counts it in `skipped_steps`.
            Nothing else changes. On CUDA, where no step waits for the device, the error comes with one of the next steps.

    Raises:
        TypeError: a parameter is not of a floating dtype.
        ValueError: an argument is out of its range.

    State of a matrix: two moments of n p numbers, as Adam's, and O(k (n + p)) more, in float32 for 16-bit parameters.

    Source: builds on Chen et al., "EA-CG", whose E[h h^T] is a a^T alone; on SOAP (Vyas et al., 2024), Adam in Shampoo's
    eigenbasis, and COSMOS (Liu et al., 2025), which keeps a part of it; the step length is by Kesten's rule (1958).
    """

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
        maximize: bool = False,
        nonfinite: str = "error",
    ):
        if isinstance(params, nn.Module):
            check_arguments(type(self).__name__, [("model", model, model in (None, params), "to be given once")])
            model, params = params, list(params.parameters())
        elif not (model is None or isinstance(model, nn.Module)):
            raise TypeError(f"EigenAdam: expected model to be an nn.Module, got {type(model).__name__}")
        checks: list[tuple[str, Any, bool, str]] = [
            ("betas", betas, len(betas) == 2 and 0 <= betas[0] < 1 and 0 < betas[1] < 1, "in [0, 1) and (0, 1)"),
            ("rank", rank, rank is None or (isinstance(rank, int) and rank >= 1), "to be an int >= 1, or None"),
            ("renew_every", renew_every, isinstance(renew_every, int) and renew_every >= 1, "to be an int >= 1"),
            ("nonfinite", nonfinite, nonfinite in ("error", "skip"), "'error' or 'skip'"),
        ]
        check_arguments(type(self).__name__, checks)
        self._model = None if model is None else _plain(model)
        self._rank, self._renew_every, self._nonfinite = rank, renew_every, nonfinite
        self._reset()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        check_numbers(type(self).__name__, defaults, _NUMBERS)
        super().__init__(params, defaults)
        self._hook()

    def _reset(self) -> None:
        """What is no part of the state."""
        self._handles: list[Any] = []
        weakref.finalize(self, remove_handles, self._handles)
        self._matrices: list[Matrix] | None = None
        self._sketches: dict[Matrix, tuple[Tensor, int]] = {}
        self._seeing: bool | None = None  # whether the next step renews bases; None: not known yet
        self._group: dist.ProcessGroup | None = None  # of the ranks that DDP averages gradients over
        self._announced: set[str] = set()  # warnings given
        self._report: tuple[Tensor, Any] | None = (
            None  # control on its way from the device, and the event that tells of its arrival
        )

    # --- the model -----------------------------------------------------------------------------------------------------------

    def _lay_anew(self) -> None:
        """Finds the matrices of the parameters that there are now, and lays the hooks on their layers."""
        self.remove_hooks()
        self._matrices = None
        self._hook()

    def _hook(self) -> None:
        """Lays the hooks through which layers show their inputs."""
        hook = InputHook(self)
        for matrix in self._table():
            self._handles += [module.register_forward_hook(hook) for module in matrix.modules]

    def remove_hooks(self) -> None:
        """Takes the hooks off the model: it is an ordinary module again, and bases come from gradients alone."""
        remove_handles(self._handles)
        self._sketches.clear()

    def _table(self) -> list[Matrix]:
        """The matrices of all groups' parameters."""
        if self._matrices is None:
            own = (p for group in self.param_groups for p in group["params"])
            self._matrices = [matrix for matrix in matrices(own, self._model) if matrix.weight.numel()]
            self._owner: dict[Any, Matrix] = {matrix.weight: matrix for matrix in self._matrices if matrix.modules}
        return self._matrices

    def _see(self, module: nn.Module, inputs: Tensor) -> None:
        """Takes a sketch of a layer's inputs where the next step renews bases."""
        if self._seeing is None:
            self._seeing = self._due()
        matrix = self._owner.get(module._parameters["weight"]) if self._seeing else None
        if matrix is None:
            return
        ddp = DistributedDataParallel._get_active_ddp_module()
        if ddp is not None:
            self._group = ddp.process_group
        with torch.no_grad():
            rows = input_rows(module, inputs.detach()).to(compute_dtype(matrix.weight.dtype))
            if not len(rows):
                return
            state = self._state(matrix, len(rows))
            mean, basis = state["mean"], state["basis_in"]
            if not state["renewals"] and matrix not in self._sketches and mean.numel() and self._group is None:
                mean.copy_(rows.mean(0))
            sketch, seen = self._sketches.get(matrix) or (rows.new_zeros(len(basis) + 1, rows.shape[1]), 0)
            ops.eigen_sketch_(sketch, rows, basis, mean)
            self._sketches[matrix] = sketch, seen + len(rows)

    # --- the state -----------------------------------------------------------------------------------------------------------

    @property
    def _first(self) -> Tensor:
        """The parameter whose state has what belongs to all."""
        return next(p for group in self.param_groups for p in group["params"])

    def _control(self) -> Tensor:
        """What finds the step length, [8] in float64: see `ops.eigen`."""
        state = self.state[self._first]
        if "control" not in state:
            state["control"] = torch.tensor([0.01, *[0.0] * 7], dtype=torch.float64, device=self._first.device)
            state.update(steps=0, refused=0)
        return state["control"]

    def _due(self) -> bool:
        """Whether the next step renews bases."""
        steps = self.state[self._first].get("steps", 0)
        return bool(steps < FIRST or steps % self._renew_every == 0)

    def _state(self, matrix: Matrix, rows: int) -> dict[str, Any]:
        """A matrix' state, made when its inputs or gradient are first seen; rows: how many inputs it sees at a time."""
        state = self.state[matrix.weight]
        n, p = matrix.shape
        if "exp_avg" in state and (state["mean"].numel() > 0) == (matrix.bias is not None):
            return state
        k = (self._rank or (16 if rows >= MANY_ROWS else 8)) if matrix.eigen else 0
        ku, kv = (length if matrix.eigen and length <= 2 * k + 1 else k for length in (n, p))
        columns = kv + (matrix.bias is not None)
        rest = ku * columns + (n * columns if ku < n else 0) + (ku * p if kv < p else 0)
        residual = ku < n and kv < p
        sampled = max(1, min(n, k or SAMPLED // p)) if residual else 0
        device, dtype = matrix.weight.device, compute_dtype(matrix.weight.dtype)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        generator = torch.Generator().manual_seed(n * 1_000_003 + p)

        def basis(k: int, length: int) -> Tensor:
            numbers = torch.randn(length, k, generator=generator, dtype=torch.float64)
            return torch.linalg.qr(numbers)[0].T.to(device, dtype).contiguous()

        state.update(
            step=0, renewals=0, seen=False, basis_out=basis(ku, n), basis_in=basis(kv, p), scale_out=zeros(ku),
            scale_in=zeros(kv), mean=zeros(p if matrix.bias is not None else 0), exp_avg=zeros(rest + residual * n * p),
            exp_avg_sq=zeros(rest + residual * n * p), last=zeros(rest + sampled * p),
            size=torch.zeros(1, device=device, dtype=torch.float64),
        )  # fmt: skip
        return state

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the hooks, what they have seen, and what a scheduler has put around `step`."""
        passing = ("_handles", "_matrices", "_owner", "_sketches", "_seeing", "_group", "_announced", "_report", "step")
        return {key: value for key, value in self.__dict__.items() if key not in passing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Lays hooks on the copy's own model; `load_state_dict` comes here too, with the state alone."""
        super().__setstate__(state)
        if "_handles" not in self.__dict__:
            self._reset()
            self._hook()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every torch optimizer's; the state keeps its dtypes.

        Raises:
            ValueError: it is not EigenAdam's, or of other parameters.
        """
        own = [p for group in self.param_groups for p in group["params"]]
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        weights = {matrix.weight: matrix for matrix in self._table()}
        for i, p in zip(saved, own, strict=False):
            state, matrix = state_dict["state"].get(i), weights.get(p)
            if state is None or ("control" in state and "step" not in state):
                continue
            if matrix is None or "basis_out" not in state or "basis_in" not in state:
                raise ValueError(
                    f"{type(self).__name__}.load_state_dict(): expected the state of an EigenAdam, got one of {sorted(state)}"
                )
            shape = state["basis_out"].shape[-1], state["basis_in"].shape[-1]
            if shape != matrix.shape:
                raise ValueError(
                    f"{type(self).__name__}.load_state_dict(): expected the state of a matrix of shape {list(matrix.shape)} for "
                    f"{matrix.name!r}, got one of {list(shape)}"
                )
        super().load_state_dict(state_dict)
        self._sketches.clear()
        self._seeing = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every torch optimizer's; parameters that were frozen so far move from the group they are in."""
        params = param_group.get("params")
        if params is not None and not isinstance(params, Tensor):
            params = param_group["params"] = list(params)
        for p in [params] if isinstance(params, Tensor) else params or ():
            if isinstance(p, Tensor) and not p.is_floating_point():
                raise TypeError(f"{type(self).__name__}: expected parameters of a floating dtype, got {p.dtype}")
            for group in self.param_groups:
                if "exp_avg" not in self.state.get(p, ()) and any(p is each for each in group["params"]):
                    group["params"] = [each for each in group["params"] if each is not p]
        super().add_param_group(param_group)
        if self._handles or self._matrices is not None:
            self._lay_anew()

    # --- the step ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step from the parameters' gradients.

        Args:
            closure: computes the loss anew and goes backward through it; called once, first.

        Returns:
            The closure's value, or None.

        Raises:
            NonFiniteError: a gradient, or a layer's input, is NaN or inf (nonfinite="error"). Nothing has changed.
            RuntimeError: there is no gradient, or a sparse one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._step()
        finally:
            self._sketches.clear()
            self._seeing = None
        if loss is not None and not self._first.is_cuda:
            self._watch(loss)
        return loss

    def _step(self) -> None:
        groups = self._groups()
        sign = -1 if self._maximize() else 1
        if any(m.bias is not None and m.weight.grad is None and m.bias.grad is not None for m in self._table()):
            self._lay_anew()  # a weight was frozen, but not its bias
        present = [(matrix, g) for matrix in self._table() if (g := matrix.weight.grad) is not None]
        if not present:
            raise RuntimeError(f"{type(self).__name__}.step(): expected gradients, found none; call loss.backward() first")
        control, due = self._control(), self._due()
        self._read_report()
        dtype = self._dtype(present)
        nothing = torch.empty(0, device=control.device, dtype=dtype)
        states, weights, biases, weight_grads, bias_grads = [], [], [], [], []
        for matrix, g in present:
            if g.layout is not torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__}.step(): expected dense gradients, got a sparse one for {matrix.name!r}; "
                    "use sparse=False"
                )
            states.append(self._state(matrix, 0))
            weights.append(_values(matrix.weight, matrix.shape, dtype))
            weight_grads.append(_gradient(g, matrix.shape, dtype, sign))
            bias = matrix.bias
            if bias is None:
                biases.append(nothing)
                bias_grads.append(nothing)
            else:  # a bias that was frozen has a gradient of zeros, so that it does not move
                biases.append(_values(bias, bias.shape, dtype))
                bias_grads.append(
                    torch.zeros_like(biases[-1]) if bias.grad is None else _gradient(bias.grad, bias.shape, dtype, sign)
                )
        if due:
            self._renew([matrix for matrix, _ in present], states, control, weight_grads, bias_grads)
        of_weights = [groups[matrix.weight] for matrix, _ in present]
        of_biases = [groups[matrix.weight if matrix.bias is None else matrix.bias] for matrix, _ in present]
        beta1, beta2 = of_weights[0]["betas"]
        ops.eigen_step_(
            weights, biases, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [s["last"] for s in states],
            [s["size"] for s in states], control, weight_grads, bias_grads, [s["mean"] for s in states],
            [s["basis_out"] for s in states], [s["basis_in"] for s in states], [float(g["lr"]) for g in of_weights],
            [float(g["lr"]) for g in of_biases], [float(g["weight_decay"]) for g in of_weights],
            [float(g["weight_decay"]) for g in of_biases], [s["step"] for s in states], beta1, beta2,
            of_weights[0]["eps"], due,
        )  # fmt: skip
        if not self._taken(control):
            return
        for (matrix, _), state, weight, bias in zip(present, states, weights, biases, strict=True):
            _write_back(matrix.weight, weight)
            if matrix.bias is not None:
                _write_back(matrix.bias, bias)
            state["step"] += 1
            state["renewals"] += due and matrix.eigen
        self.state[self._first]["steps"] += 1

    def _groups(self) -> dict[Tensor, dict[str, Any]]:
        """The group of every parameter, once the groups' numbers are known to be valid."""
        for group in self.param_groups:
            check_numbers(f"{type(self).__name__}.step()", group, _NUMBERS)
        return {p: group for group in self.param_groups for p in group["params"]}

    def _dtype(self, present: list[tuple[Matrix, Tensor]]) -> torch.dtype:
        """What all parameters are computed in."""
        device = present[0][0].weight.device
        dtypes = set()
        for matrix, _ in present:
            if matrix.weight.device != device:
                raise RuntimeError(
                    f"{type(self).__name__}.step(): expected all parameters on one device, got {present[0][0].name!r} "
                    f"on {device} and {matrix.name!r} on {matrix.weight.device}"
                )
            dtypes.add(compute_dtype(matrix.weight.dtype))
        if len(dtypes) > 1:
            raise RuntimeError(
                f"{type(self).__name__}.step(): expected all parameters of one dtype, 16-bit ones counting as float32, got "
                f"{' and '.join(sorted(map(str, dtypes)))}"
            )
        return dtypes.pop()

    def _renew(
        self,
        present: list[Matrix],
        states: list[dict[str, Any]],
        control: Tensor,
        weight_grads: list[Tensor],
        bias_grads: list[Tensor],
    ) -> None:
        """Renews the bases of all matrices from their inputs' sketches and their gradients."""
        sketches = self._sketches if self._group is None else self._averaged(present)
        unseen, chosen, given = [], [], []
        for i, matrix in enumerate(present):
            if not matrix.eigen:
                continue
            sketch, rows = sketches.get(matrix, (weight_grads[i].new_empty(0), 0))
            if matrix.modules and not rows:
                if states[i]["seen"]:
                    continue  # the basis of its inputs stays, rather than being mixed with one of its gradients
                unseen.append(matrix.name)
            states[i]["seen"] |= rows > 0
            chosen.append(i)
            given.append((sketch, rows))
        if unseen and "unseen" not in self._announced:
            self._announced.add("unseen")
            warn(
                f"{type(self).__name__} sees no inputs of {', '.join(unseen)}: the layers run in a compiled graph, or are not "
                "called as modules. Their bases are those of their gradients."
            )
        if not chosen:
            return
        of = [states[i] for i in chosen]
        ops.eigen_renew_(
            [s["mean"] for s in of], [s["basis_out"] for s in of], [s["basis_in"] for s in of], [s["scale_out"] for s in of],
            [s["scale_in"] for s in of], [s["exp_avg"] for s in of], control, [weight_grads[i] for i in chosen],
            [bias_grads[i] for i in chosen], [sketch for sketch, _ in given], [rows for _, rows in given],
            [(1 - DECAY) / (1 - DECAY ** (s["renewals"] + 1)) for s in of],
        )  # fmt: skip

    def _averaged(self, present: list[Matrix]) -> dict[Matrix, tuple[Tensor, int]]:
        """The sketches of all ranks' inputs, per input, as if one had seen them all."""
        wanted = [matrix for matrix in present if matrix.eigen and matrix.modules]
        if not wanted:
            return {}
        own = []
        for matrix in wanted:
            basis = self.state[matrix.weight]["basis_in"]
            sketch, rows = self._sketches.get(matrix) or (basis.new_zeros(len(basis) + 1, basis.shape[1]), 0)
            own += [sketch.flatten(), sketch.new_full((1,), rows)]
        flat = torch.cat(own)
        dist.all_reduce(flat, group=self._group)
        pieces = flat.split([piece.numel() for piece in own])
        averaged = {}
        for i, matrix in enumerate(wanted):
            width = matrix.shape[1]
            averaged[matrix] = (pieces[2 * i] / pieces[2 * i + 1].clamp(min=1)).view(-1, width), 1
        return averaged

    def _taken(self, control: Tensor) -> bool:
        """Whether the step was made, where that is known without waiting; raises, counts or warns where it should."""
        if control.is_cuda:
            copy = torch.empty(control.shape, dtype=control.dtype, pin_memory=True).copy_(control, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._report = copy, event
            return True
        return self._heed(control.tolist())

    def _read_report(self) -> None:
        """On CUDA: what became of a step before this one, if the device has told by now."""
        if self._report is not None and self._report[1].query():
            entries, self._report = self._report[0].tolist(), None
            self._heed(entries)

    def _heed(self, entries: list[float]) -> bool:
        """Whether these entries of control are of a step that was made."""
        state = self.state[self._first]
        refused = int(entries[_REFUSED]) - state["refused"]
        if not refused:
            return True
        state["refused"] += refused
        if self._nonfinite == "error":
            raise NonFiniteError(
                f"{type(self).__name__}.step(): expected finite gradients and inputs, got NaN or inf, or numbers whose squares "
                "are; no parameter and no state has changed"
            )
        return False

    def _watch(self, loss: Any) -> None:
        """Warns where a closure's loss has grown to a thousand times the first one."""
        value = abs(float(loss.detach() if isinstance(loss, Tensor) else loss))
        first = self.state[self._first].setdefault("first_loss", value)
        if value > 1000 * first > 0 and "growth" not in self._announced:
            self._announced.add("growth")
            warn(
                f"{type(self).__name__}: the loss has grown from {first:.3g} to {value:.3g}: training diverges. "
                "Lower lr, or clip the gradients."
            )

    @property
    def skipped_steps(self) -> int:
        """Steps that were not made since a gradient or an input was not finite. Part of the state_dict; waits for the device."""
        return int(self._control()[_REFUSED])

    def metrics(self) -> dict[str, float]:
        """What is worth watching, waiting for the device.

        Returns:
            "length": the step length, without lr; "slope": the average slope along the present step, per step length;
            "slope_ratio": that along the step before over it, -1 to 1 or so: above 0.1 steps grow, below -0.6 they shrink;
            "oscillations": how many steps had a negative one; "skipped_steps".
        """
        entries = self._control().tolist()
        return {
            "length": _length(entries),
            "slope": entries[_SLOPE],
            "slope_ratio": entries[_LAST_SLOPE] / (abs(entries[_SLOPE]) or 1.0),
            "oscillations": entries[_OSCILLATIONS],
            "skipped_steps": entries[_REFUSED],
        }


def _length(entries: list[float]) -> float:
    """The step length that control's entries give, without lr."""
    return entries[_LENGTH] / (1 + entries[_OSCILLATIONS] / 25) ** 0.5 * min(1.0, (entries[_STEPS] + 2) / 14)


def _plain(model: nn.Module) -> nn.Module:
    """The model without torch.compile's and DDP's wrappers, which share its parameters and call it."""
    model = getattr(model, "_orig_mod", model)
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return getattr(model, "_orig_mod", model)


def _values(p: Tensor, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """A parameter's values as a contiguous matrix or vector that is written to: itself, or else a copy."""
    if p.dtype is dtype and p.is_contiguous():
        return p if p.shape == shape else p.detach().view(*shape)
    return p.detach().to(dtype).contiguous().view(*shape)


def _write_back(p: Tensor, values: Tensor) -> None:
    """Gives a parameter the values that a copy of it was given."""
    if values.data_ptr() != p.data_ptr():
        p.copy_(values.view(p.shape))


def _gradient(g: Tensor, shape: Iterable[int], dtype: torch.dtype, sign: int) -> Tensor:
    """A gradient of what is minimised, as a matrix or vector."""
    g = g.to(dtype)
    g = g if g.shape == shape else g.reshape(*shape)
    return -g if sign < 0 else g
