"""What tells graphs of one structure apart: where their nodes send rows, by saved sizes, indices and zeros of constants."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

# Nodes that send rows elsewhere, and the saved values that decide where.
_PLACES = {
    "SliceBackward": ("_saved_dim", "_saved_start", "_saved_end", "_saved_step"),
    "SelectBackward": ("_saved_dim", "_saved_index"),
    "SplitBackward": ("_saved_dim", "_saved_split_size"),
    "RollBackward": ("_saved_shifts", "_saved_dims"),
    "FlipBackward": ("_saved_dims",),
    "PermuteBackward": ("_saved_dims",),
    "TransposeBackward": ("_saved_dim0", "_saved_dim1"),
    "CatBackward": ("_saved_dim",),
    "ViewBackward": ("_saved_self_sym_sizes",),
    "UnsafeViewBackward": ("_saved_self_sym_sizes",),
    "ReshapeAliasBackward": ("_saved_self_sym_sizes",),
    "SplitWithSizesBackward": ("_saved_dim", "_saved_split_sizes"),
    "UnfoldBackward": ("_saved_dimension", "_saved_size", "_saved_step"),
    "AsStridedBackward": ("_saved_size", "_saved_stride", "_saved_storage_offset"),
    "DiagonalBackward": ("_saved_offset", "_saved_dim1", "_saved_dim2"),
    "SumBackward": ("_saved_dim",),
    "MeanBackward": ("_saved_dim",),
    "CumsumBackward": ("_saved_dim",),
}
# The beginnings of the names of nodes that send rows by an index, and the names under which they may have saved it.
_BY_VALUE = ("Index", "Gather", "Take", "Scatter", "Masked", "Sort", "Topk", "Embedding", "Where")
_INDICES = ("_saved_indices", "_saved_index", "_saved_mask", "_saved_condition")
# Products, which send rows where a constant operand is not zero, and the names under which they have saved their operands.
_PRODUCTS = {
    "MmBackward": ("_saved_self", "_saved_mat2"),
    "BmmBackward": ("_saved_self", "_saved_mat2"),
    "MvBackward": ("_saved_self", "_saved_vec"),
    "SparseAddmmBackward": ("", "_saved_mat1", "_saved_mat2"),
}


def saved_places(node: Any, name: str) -> tuple[list[Any], bool]:
    """Returns what says where a node sends rows, and whether it sends them by an index that is not known."""
    if name in _PLACES:
        return [tuple(_hashable(getattr(node, saved, None)) for saved in _PLACES[name])], False
    if name.startswith(_BY_VALUE):
        indices = _indices(node)
        return [(indices, getattr(node, "_saved_dim", None))], indices is None
    return [], False


def zero_patterns(node: Any, name: str) -> list[Any]:
    """Returns what says where a product's constant operands are not zero, on the CPU: elsewhere to look would be a wait."""
    if name not in _PRODUCTS:
        return []
    pairs = zip(_PRODUCTS[name], node.next_functions, strict=True)
    constants = [getattr(node, saved) for saved, (following, _) in pairs if following is None and saved]
    return [tuple(_hashed(place) for t in constants if isinstance(t, Tensor) and t.is_cpu for place in _nonzero(t))]


def _indices(node: Node) -> tuple[Any, ...] | None:
    """Returns hashes of the indices by which a node sends rows; None: they are unknown, or known only after a wait."""
    found = [getattr(node, name) for name in _INDICES if hasattr(node, name)]
    tensors = [t for value in found for t in (value if isinstance(value, list | tuple) else [value]) if t is not None]
    if not tensors or not all(isinstance(t, Tensor) and t.is_cpu for t in tensors):
        return None
    return tuple(map(_hashed, tensors))


def _nonzero(t: Tensor) -> list[Tensor]:
    """Returns what tells where a matrix is not zero."""
    if t.layout == torch.sparse_coo:
        return [t._indices()]
    if t.layout == torch.sparse_csr:
        return [t.crow_indices(), t.col_indices()]
    return [t != 0] if t.layout == torch.strided else []


def _hashed(t: Tensor) -> tuple[Any, ...]:
    """Returns a tensor's shape and a hash of its numbers."""
    return tuple(t.shape), hash(t.detach().contiguous().numpy().tobytes())


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
