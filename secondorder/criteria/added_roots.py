"""Roots at a tensor of which an output's numbers are taken, several times or as differences: the instances' H_i add up."""

import torch
from torch import Tensor

from secondorder.criteria.roots import BernoulliRoot, ClassesElsewhere, GaussianRoot, OutputRoot, SoftmaxRoot, dense_root

_DENSE = 2**24  # so many numbers may the H_i have that are added up as matrices


def added_up(root: OutputRoot, positions: Tensor, shape: torch.Size, dim: int | None) -> OutputRoot | None:
    """Returns the root at a tensor of which the output's numbers are taken, some of them several times: their H_i add up.

    Args:
        root: at the output.
        positions: of the output's numbers among those of this tensor, of the output's shape.
        shape: of this tensor.
        dim: where its classes are; None: it has none.

    Returns:
        None: it is a root of which this is not known, or all are one number, which is no row of a layer.
    """
    if not shape:
        return None

    def back(t: Tensor) -> Tensor:
        return _sums_at(positions, t, shape)

    if isinstance(root, BernoulliRoot):
        mass = back(root.mass)
        p = _shared(back(root.mass * root.p), mass)
        return BernoulliRoot((mass * p * (1 - p)).sqrt(), p, mass)
    if type(root) is GaussianRoot:
        return GaussianRoot(back(root.root.square()).sqrt())
    if dim is None:
        return None
    # All uses of a row have its p: sum_i mass_i p_ik adds up to mass p_k.
    if isinstance(root, SoftmaxRoot):
        weighted = back(root.p * root.mass.unsqueeze(1))
    elif isinstance(root, ClassesElsewhere):
        weighted = back(root.placed((root.root.p * root.root.mass.unsqueeze(1)).unsqueeze(0)).squeeze(0))
    else:
        return None
    weighted = weighted.movedim(dim, -1)
    flat = weighted.reshape(-1, weighted.shape[-1])
    mass = flat.sum(1)
    return ClassesElsewhere(SoftmaxRoot(_shared(flat, mass.unsqueeze(1)), mass), weighted.shape, dim)


def densely_added_up(root: OutputRoot, positions: Tensor, shape: torch.Size) -> OutputRoot | None:
    """Returns the same for any root of an output whose instances are rows, by the matrices H_i themselves.

    Args:
        root: at the output [m, K], or with its classes elsewhere.
        positions: as for `added_up`.
        shape: of the tensor that the numbers are taken of, [..., n]; those of an instance are of one of its rows.

    Returns:
        None: an instance has numbers of several rows, or the matrices are too large.
    """
    dim = root.dim if isinstance(root, ClassesElsewhere) else 1
    if not shape or (positions.dim() != 2 and not isinstance(root, ClassesElsewhere)):
        return None
    n, places = shape[-1], positions.movedim(dim, -1).flatten(0, -2)
    m, k = places.shape
    if max(m * k * max(k, root.count), shape.numel() * n) > _DENSE:
        return None
    rows, places = places // n, places % n
    if (rows != rows[:, :1]).any():
        return None
    columns = root.columns(0, root.count).movedim(1 + dim, -1).flatten(1, -2)
    entries = (rows * n + places).unsqueeze(2) * n + places.unsqueeze(1)
    return dense_root(_sums_at(entries, torch.einsum("cik,cil->ikl", columns, columns), torch.Size((*shape, n))))


def differences_added_up(root: GaussianRoot, first: Tensor, second: Tensor, shape: torch.Size) -> OutputRoot | None:
    """Returns the root at a tensor whose numbers are subtracted from each other, its rows' H_i added up over all differences.

    Args:
        root: at the differences [..., K], whose rows are the instances.
        first: positions of what is subtracted from, among the numbers of the tensor, of the differences' shape.
        second: likewise of what is subtracted.
        shape: of the tensor, [..., n].

    Returns:
        None: no row of the tensor is in several instances, whose own columns are exact; or the matrices are too large.
    """
    n = shape[-1]
    rows = torch.cat([first, second], -1).flatten(0, -2) // n
    instances = torch.arange(len(rows), device=rows.device).unsqueeze(1).expand_as(rows)
    last = instances.new_zeros(shape[:-1].numel()).scatter_(0, rows.flatten(), instances.flatten())
    if (last[rows] == instances).all():
        return None
    weights = root.root.square().masked_fill(first == second, 0)  # a difference of a number from itself is zero
    within = (first // n == second // n) & (first != second)
    if not within.any():
        return GaussianRoot(_sums_at(torch.cat([first, second]), torch.cat([weights, weights]), shape).sqrt())
    if shape.numel() * n > _DENSE:
        return None
    coupled = -weights * within
    places = [p * n + q % n for p, q in ((first, first), (second, second), (first, second), (second, first))]
    return dense_root(_sums_at(torch.cat(places), torch.cat([weights, weights, coupled, coupled]), torch.Size((*shape, n))))


def _sums_at(positions: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """Returns a tensor of this shape whose numbers are the sums of the values at their positions."""
    return values.new_zeros(shape.numel()).index_add_(0, positions.flatten(), values.flatten()).view(shape)


def _shared(weighted: Tensor, mass: Tensor) -> Tensor:
    """Returns weighted / mass; 0 where both are."""
    return weighted / mass.masked_fill(mass == 0, 1)
