"""Residuals drawn at random, which stand for all in a step, and those that are held out."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder._tape.plans import Block
from secondorder.stepping.least_squares_loss import Residuals

SHARE = 0.5  # each term has at least this share of an equal share of the rows
HELD = 10  # one of so many residuals is held out,
HELD_BLOCK = 100  # in blocks with at least so many


class DrawnRows(NamedTuple):
    """The residuals that a step looks at."""

    drawn: list[Tensor | None]  # of each block, the positions of those drawn; None: all
    flat: Tensor  # [m], their positions among the residuals of all terms, flattened
    scales: list[Tensor]  # of each block, the root of c n / m
    scale: Tensor  # [m], the same of all blocks
    total: int  # how many residuals there are
    whole: bool  # whether these are all residuals
    held: list[tuple[Tensor, Tensor, Tensor]]  # of each block: those held out and the others, as in `flat`, and their roots of c

    def taken(self, values: Sequence[Tensor]) -> Tensor:
        """Returns the weighted residuals of these rows [m], of the residuals of all terms."""
        return torch.cat([v.detach().flatten() for v in values])[self.flat] * self.scale

    def held_losses(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Returns what the loss of the blocks with residuals held out is by these alone, by the others alone, and by all.

        Nothing if none are held out.
        """
        if not self.held:
            return []
        flat = torch.cat([v.detach().flatten() for v in values])
        sums = [torch.zeros((), dtype=torch.float64, device=flat.device)] * 3
        for out, inside, scale in self.held:
            squares = (flat[torch.cat([out, inside])] * scale).square().double()
            parts = (*squares.split([len(out), len(inside)]), squares)
            sums = [total + part.mean() * len(squares) for total, part in zip(sums, parts, strict=True)]
        return sums


def draw_rows(
    blocks: Sequence[Block], here: Residuals, rows: float, generator: torch.Generator, holds: Callable[[Block], bool]
) -> DrawnRows:
    """Draws residuals: from each block in proportion to its size, but at least half of an equal share.

    Args:
        blocks: all residuals.
        here: the residuals and their coefficients.
        rows: how many to draw; all, if there are no more.
        generator: draws them.
        holds: tells of which large blocks a part is held out, the same one in every step.
    """
    total = sum(block.size for block in blocks)
    whole = rows >= total
    fixed = torch.Generator().manual_seed(HELD)
    offsets = [0]
    for r in here.values:
        offsets.append(offsets[-1] + r.numel())
    drawn: list[Tensor | None] = []
    flat, scales, held = [], [], []
    for block in blocks:
        c = here.weights[block.term].reshape(-1)
        all_elements = block.chosen(None, c.device) + offsets[block.term]
        d, kept = None, block.size
        if block.size >= HELD_BLOCK and holds(block):
            order = torch.randperm(block.size, generator=fixed, device="cpu")
            out, inside = order[: block.size // HELD], order[block.size // HELD :]
            ordered = all_elements[order.to(c.device, non_blocking=True)]
            held.append((*ordered.split([len(out), len(inside)]), c[ordered - offsets[block.term]].sqrt()))
            kept, d = len(inside), inside
        if not whole:
            equal = int(SHARE * rows / len(blocks))
            m = min(kept, max(math.ceil(rows * block.size / total), equal, 2))
            chosen = torch.randperm(kept, generator=generator, device="cpu")[:m]
            d = chosen if d is None else d[chosen]
        if d is not None:
            d = d.sort()[0].to(c.device, non_blocking=True)
            c = c * (block.size / len(d))
        elements = block.chosen(d, c.device)
        drawn.append(d)
        flat.append(elements + offsets[block.term])
        scales.append(c[elements].sqrt())
    return DrawnRows(drawn, torch.cat(flat), scales, torch.cat(scales), total, whole and not held, held)
