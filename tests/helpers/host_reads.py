"""Which values a step reads on the host, found without a GPU: there each of them would wait for the device."""

import traceback
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# What returns numbers, or sizes that depend on numbers.
READS = {
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.is_nonzero.default, aten.multinomial.default,
    aten._linalg_check_errors.default, aten.unique_consecutive.default, aten._unique2.default, aten.masked_select.default,
}  # fmt: skip


class HostReads(TorchDispatchMode):
    """Counts the reads of tensors that stand for a device's, by where they happen in the package.

    These are the ones given, what is computed from them, and what is made with a `device` argument; not what
    `.cpu()` returns, or what is made on the "cpu" in so many words.
    """

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self.found: Counter[str] = Counter()
        self._calls = _Calls(self)
        for tensor in tensors:
            tensor._on_device = True

    def __enter__(self) -> "HostReads":
        self._calls.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_device = any(map(is_on_device, tree_leaves((args, kwargs))))
        if on_device and func in READS:
            self.count()
        result = func(*args, **kwargs)
        if on_device:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    leaf._on_device = True
        return result

    def count(self) -> None:
        frames = [f for f in traceback.extract_stack() if "/secondorder/" in f.filename and "/tests/" not in f.filename]
        self.found[f"{frames[-1].filename.rsplit('/', 1)[1]}: {frames[-1].line}" if frames else "elsewhere"] += 1


class _Calls(TorchFunctionMode):
    """Calls that read a CPU tensor without going through the dispatcher, and whether a tensor is on the CPU."""

    def __init__(self, reads: HostReads):
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.cpu, Tensor.numpy) and is_on_device(args[0]):
            self._reads.count()
            if func is Tensor.cpu:
                copy = args[0].detach().clone()
                del copy._on_device
                return copy
        if func == Tensor.is_cpu.__get__ and is_on_device(args[0]):
            return False
        result = func(*args, **(kwargs or {}))
        if (kwargs or {}).get("device") not in (None, "cpu") and isinstance(result, Tensor):
            result._on_device = True
        return result


def is_on_device(value: object) -> bool:
    return isinstance(value, Tensor) and getattr(value, "_on_device", False)
