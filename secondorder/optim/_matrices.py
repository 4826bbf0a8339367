"""Parameters as matrices [n, p]: the bias that belongs to each, its values, and the inputs that it is multiplied with."""

import contextlib
import math
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from secondorder._tensors import captured_now, cast, compute_dtype, here, is_sharded, real_view

# Modules whose weight [n_out, n_in, ...] multiplies their one input, as rows.
_LINEAR = (nn.Linear,)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Modules whose weight's rows are looked up, each by itself, so that the weight has no bases.
_TABLES = (nn.Embedding, nn.EmbeddingBag)

# At most so many are looked at in a call:
ROWS = 4096  # of a linear layer's input
PATCHES = 1024  # of a convolution's input


@dataclass(eq=False)
class Matrix:
    """A parameter, or a weight with the bias that is added to its product. A complex number counts as two.

    Attributes:
        weight: its values, [n, ...].
        bias: [n], or None.
        name: of the weight.
        eigen: whether it has a basis on either side; otherwise every element stands for itself.
        modules: that multiply their inputs with it: what `input_rows` gives are the inputs that it sees.
        lookups: modules that look up its rows, of a table.
    """

    weight: Tensor
    bias: Tensor | None
    name: str
    eigen: bool
    modules: list[nn.Module] = field(default_factory=list)
    lookups: list[nn.Module] = field(default_factory=list)

    @property
    def could_be_numbers(self) -> bool:
        """Tells whether it may turn out to be no map: no module is known that uses it, and it has two sides."""
        p = self.weight
        return not (self.modules or self.lookups) and p.dim() >= 2 and 1 < len(p) < p.numel()

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Returns [n, p]."""
        numel = self.weight.numel() * (1 + self.weight.is_complex())
        if self.weight.dim() < 2:
            return 1, numel
        n = self.weight.shape[0]
        return n, numel // max(n, 1)

    @cached_property
    def shape_here(self) -> tuple[int, int]:
        """Returns the shape of what this process has: all, or some rows of a DTensor (elements, if it has one dimension)."""
        if not is_sharded(self.weight):
            return self.shape
        rows = here(self.weight).shape[0]
        return rows, self.weight.numel() // self.weight.shape[0]

    @cached_property
    def as_it_is(self) -> bool:
        """Tells whether its parameters are real tensors that are all here."""
        return not (self.weight.is_complex() or is_sharded(self.weight))

    @property
    def numel(self) -> int:
        """Returns how many numbers it has with its bias."""
        return self.weight.numel() + (0 if self.bias is None else self.bias.numel())


def matrices(
    parameters: Iterable[Tensor], model: nn.Module | None, states: Mapping[Tensor, dict[str, Any]] | None = None
) -> list[Matrix]:
    """Returns the parameters as matrices.

    Without a model, every parameter with two or more dimensions is a matrix of its own. With one, its linear layers and
    convolutions give each weight its bias and its inputs, and what they do not know, as attention's or an LSTM's weights, is a
    matrix of its own; the tables of embeddings, vectors, and what has a single row or column, are no matrices. Integers, as of
    frozen layers that are quantized, are left alone. A weight goes with its bias if both are trained, or neither; and whatever
    has been frozen since, one that has a state, in `states`, goes on as it has begun.
    """
    wanted = {p: f"parameter {i}" for i, p in enumerate(parameters) if p.is_floating_point() or p.is_complex()}
    if model is not None:
        wanted |= {p: name for name, p in model.named_parameters() if p in wanted}
    users: dict[Tensor, list[nn.Module]] = {}
    tables: dict[Tensor, list[nn.Module]] = {}
    for module in model.modules() if model is not None else ():
        # TorchScript's modules are of no type that is known here. A complex weight multiplies pairs of numbers.
        own = None if isinstance(module, torch.jit.ScriptModule) else module._parameters.get("weight")
        if own is None or own not in wanted or own.is_complex():
            continue
        if multiplies(module):
            users.setdefault(own, []).append(module)
        elif isinstance(module, _TABLES):
            tables.setdefault(own, []).append(module)
    biases: dict[Tensor, Tensor] = {}  # weight -> its bias
    taken: set[Tensor] = set()
    for weight, modules in users.items():
        if not weight.numel():
            continue
        bias: Tensor | None = modules[0]._parameters.get("bias")
        alike = all(module._parameters.get("bias") is bias for module in modules)
        alike = alike and getattr(bias, "placements", None) == getattr(weight, "placements", None)
        if bias is None or bias not in wanted or not alike or bias in taken:
            continue
        known = (states or {}).get(weight, {}).get("mean")
        together = weight.requires_grad == bias.requires_grad if known is None else known.numel() > 0
        if together:
            biases[weight] = bias
            taken.add(bias)
    found = []
    for p, name in wanted.items():
        if p in taken or not p.numel():
            continue
        eigen = p.dim() >= 2 and (p in users or (1 < p.shape[0] < p.numel() and p not in tables))
        found.append(Matrix(p, biases.get(p), name, eigen, users.get(p, []), [] if eigen else tables.get(p, [])))
    return found


def computed_in(p: Tensor) -> torch.dtype:
    """Returns what a parameter is computed in: at least float32, and of complex numbers the parts."""
    return compute_dtype(p.dtype.to_real() if p.is_complex() else p.dtype)


class Operands:
    """The parameters of matrices as an operator takes them, with the gradients of what is minimised.

    Attributes:
        dtype: what all are computed in.
        weights: [n, p] of every matrix, contiguous, to be written to.
        biases: [n] of every matrix, likewise; [0] without one.
        weight_grads: G [n, p] of every matrix; zeros where there is none.
        bias_grads: g [n] of every matrix, likewise; [0] without a bias.

    Args:
        owner: who asks, for errors.
        present: the matrices that have a gradient.
        sign: -1 where the loss is maximised.

    Raises:
        RuntimeError: parameters are on several devices or of several dtypes, expanded, of other shapes than before, or have
            sparse gradients.
    """

    def __init__(self, owner: str, present: list[Matrix], sign: int):
        self.dtype, self._device, self._sign = computed_in(present[0].weight), present[0].weight.device, sign
        self._copies: list[tuple[Tensor, Tensor]] = []
        self.weights: list[Tensor] = []
        self.biases: list[Tensor] = []
        self.weight_grads: list[Tensor] = []
        self.bias_grads: list[Tensor] = []
        nothing = torch.empty(0, dtype=self.dtype, device=self._device)
        for matrix in present:
            own, grad = self._of(owner, matrix.weight, matrix, present[0])
            if own.shape != matrix.shape_here:
                if own.numel() != math.prod(matrix.shape_here):
                    raise RuntimeError(
                        f"{owner}: expected parameters of the shapes that they have had so far, got {list(matrix.weight.shape)} "
                        f"for {matrix.name!r}; make a new optimizer"
                    )
                own, grad = own.detach().view(matrix.shape_here), grad.reshape(matrix.shape_here)
            self.weights.append(own)
            self.weight_grads.append(grad)
            bias = matrix.bias
            own, grad = (nothing, nothing) if bias is None else self._of(owner, bias, matrix, present[0])
            self.biases.append(own)
            self.bias_grads.append(grad)

    def write_back(self) -> None:
        """Gives the parameters what was written to their copies."""
        for p, copy in self._copies:
            p.copy_(copy)

    def _of(self, owner: str, p: Tensor, matrix: Matrix, first: Matrix) -> tuple[Tensor, Tensor]:
        """A parameter's values, itself where that is possible, and its gradient."""
        g = p.grad
        if (  # almost always; with small layers each call of torch is what a step costs
            g is not None
            and matrix.as_it_is
            and p.dtype is self.dtype
            and g.dtype is self.dtype
            and p.device == self._device
            and p.is_contiguous()
            and g.layout is torch.strided
            and self._sign > 0
        ):
            return p, g
        self._check(owner, p, matrix, first)
        parts = real_view(here(p)).detach()
        own = parts.to(self.dtype).contiguous()
        if own.data_ptr() != parts.data_ptr():
            self._copies.append((parts, own))
        if g is None:
            return own, torch.zeros_like(own)
        grad = cast(real_view(here(g)), self.dtype)
        return own, -grad if self._sign < 0 else grad

    def _check(self, owner: str, p: Tensor, matrix: Matrix, first: Matrix) -> None:
        if p.device != self._device:
            raise RuntimeError(
                f"{owner}: expected all parameters on one device, got {first.name!r} on {self._device} and "
                f"{matrix.name!r} on {p.device}"
            )
        if computed_in(p) is not self.dtype:
            raise RuntimeError(
                f"{owner}: expected all parameters of one dtype, 16-bit ones counting as float32, got {first.weight.dtype} and "
                f"{p.dtype} for {matrix.name!r}; give those of each dtype an optimizer of their own"
            )
        if not p.is_contiguous() and any(stride == 0 < length - 1 for stride, length in zip(p.stride(), p.shape, strict=True)):
            raise RuntimeError(f"{owner}: expected parameters with memory of their own, got expanded {matrix.name!r}")
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise RuntimeError(f"{owner}: expected dense gradients, got a sparse one for {matrix.name!r}; use sparse=False")


def multiplies(module: nn.Module) -> bool:
    """Tells whether a module's output is its weight times its input, plus its bias, by torch's own forward."""
    if isinstance(module, NonDynamicallyQuantizableLinear) or "forward" in vars(module):  # attention's is not called
        return False
    if isinstance(module, _LINEAR):
        return type(module).forward is nn.Linear.forward
    if isinstance(module, _CONVOLUTIONS):
        own = next(kind for kind in _CONVOLUTIONS if isinstance(module, kind))
        return type(module).forward is own.forward and module.padding_mode == "zeros"
    return False


class InputHook:
    """A forward hook (with_kwargs=True) that shows a module's input to an optimizer, which it does not keep alive.

    Copies of the module are another net's, and its files are read without this package: there it is a method of Python's own
    that does nothing.

    Args:
        optimizer: has methods `_see(module, input, output, captured)` and `_hook()`; `_seeing`, False where nothing is to be
            seen; and `_capturable`, whether it sees what a CUDA graph captures.
    """

    def __init__(self, optimizer: Any):
        self.optimizer = weakref.ref(optimizer)

    @property
    def __name__(self) -> str:  # what torch.jit.script asks for
        raise AttributeError(
            "the optimizer's forward hooks cannot be scripted: call optimizer.remove_hooks() before torch.jit.script(model)"
        )

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        optimizer = self.optimizer()
        # Before most steps nothing is to be seen, and small layers cost no more than these questions.
        capturable = optimizer is not None and optimizer._capturable
        if optimizer is None or (optimizer._seeing is False and not capturable) or torch.jit.is_tracing():
            return
        captured = captured_now()
        if capturable or not captured:
            optimizer._see(module, args[0] if args else kwargs.get("input"), output, captured)

    def lay(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook of a model with lazy layers: lays the hooks once its parameters are known."""
        optimizer = self.optimizer()
        if optimizer is not None:
            optimizer._hook()

    def __reduce__(self) -> tuple[Any, ...]:  # also what copy.deepcopy goes by
        return getattr, (contextlib.nullcontext(), "__exit__")


def is_plain(inputs: Any) -> bool:
    """Tells whether inputs are numbers that can be summed up: of an ordinary tensor, not one of vmap's or jvp's, and some."""
    return (
        isinstance(inputs, Tensor)
        and inputs.layout is torch.strided
        and not inputs.is_nested
        and inputs.numel() > 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def input_rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """Returns the rows [m, p] that a module's weight multiplies, inputs or patches: evenly spread ones where they are many."""
    if isinstance(module, _LINEAR):
        rows = inputs.reshape(-1, inputs.shape[-1])
        stride, places = math.ceil(len(rows) / ROWS), math.prod(inputs.shape[1:-1])
        while math.gcd(stride, places) > 1:  # it would meet some places of each sequence alone
            stride += 1
        return rows[::stride] if stride > 1 else rows
    return _patches(module, inputs)


def _patches(module: Any, inputs: Tensor) -> Tensor:
    """At most PATCHES of the patches [c_in / groups * prod(kernel)] that a convolution's outputs are made of, of all groups."""
    size = len(module.kernel_size)
    x = inputs if inputs.dim() == size + 2 else inputs.unsqueeze(0)
    geometry = (*map(tuple, (module.kernel_size, module.stride, module.dilation)), _padding(module))
    places, inside = _kept_places((len(x), tuple(x.shape[2:]), *geometry, x.device), type(inputs) in (Tensor, nn.Parameter))
    patches = x.movedim(1, -1)[places] * inside  # [m, *kernel, c_in]
    patches = patches.movedim(-1, 1)
    groups = int(module.groups)
    return patches.reshape(len(patches) * groups, -1)


_Places = tuple[tuple[Tensor, ...], Tensor]
_PLACES: dict[tuple[Any, ...], _Places] = {}  # the last one used at the end
_READ_BY_GRAPHS: set[_Places] = set()  # which CUDA graphs read at their addresses as long as they are replayed


def _kept_places(key: tuple[Any, ...], ordinary: bool) -> _Places:
    """`_patch_places(*key)`, kept for the next call if `ordinary`: the tensors of a mode such as FakeTensorMode must not stay."""
    if not ordinary:
        return _patch_places(*key)
    found = _PLACES.pop(key, None)
    if captured_now():
        if found is None:  # the memory is the graph's, and is filled by its replays alone
            return _patch_places(*key)
        _READ_BY_GRAPHS.add(found)
    elif found is None:
        found = _patch_places(*key)
    while len(_PLACES) >= 32:  # an entry takes 66 KB for a kernel of 3 x 3
        del _PLACES[next(iter(_PLACES))]
    _PLACES[key] = found
    return found


def _patch_places(
    instances: int,
    lengths: tuple[int, ...],
    kernels: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    device: torch.device,
) -> _Places:
    """Where the patches lie in inputs [instances, *lengths, c]: their indices, and [m, *kernel, 1], whether that is inside."""
    extents = [
        (length + sum(pad) - dilation * (kernel - 1) - 1) // stride + 1
        for length, pad, kernel, stride, dilation in zip(lengths, padding, kernels, strides, dilations, strict=True)
    ]
    total, size = instances * math.prod(extents), len(lengths)
    chosen = torch.arange(min(total, PATCHES), device=device) * total // min(total, PATCHES)
    inside = torch.ones((), dtype=torch.bool, device=device)
    places: list[Tensor] = []
    for axis in reversed(range(size)):  # the last axis varies fastest
        at, chosen = chosen % extents[axis], chosen // extents[axis]
        kernel = torch.arange(kernels[axis], device=device) * dilations[axis]
        place = at.unsqueeze(1) * strides[axis] - padding[axis][0] + kernel
        shape = [len(at), *(len(kernel) if i == axis else 1 for i in range(size))]
        inside = inside & ((place >= 0) & (place < lengths[axis])).reshape(shape)
        places.insert(0, place.clamp(0, lengths[axis] - 1).reshape(shape))
    return (chosen.reshape(-1, *[1] * size), *places), inside.unsqueeze(-1)


def _padding(module: Any) -> tuple[tuple[int, int], ...]:
    """Zeros before and after each axis."""
    if module.padding == "valid":
        return ((0, 0),) * len(module.kernel_size)
    if module.padding == "same":  # torch puts the odd one at the end
        needs = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple((need // 2, need - need // 2) for need in needs)
    return tuple((p, p) for p in module.padding)
