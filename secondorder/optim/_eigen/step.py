"""One step of EigenAdam: what its operators take of every matrix, and what the states note once it is made."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secondorder import ops
from secondorder.ops.eigen import FIRST_LENGTH, LENGTH, REFUSED, STEPS, UNRENEWED, renewals_before
from secondorder.optim._eigen.matrices import Matrix
from secondorder.optim._eigen.operands import Operands
from secondorder.optim._eigen.rates import MatrixRates
from secondorder.optim._eigen.renewal import DECAY, Renewal, finite_or_zero
from secondorder.optim._eigen.replays import Replay
from secondorder.optim._eigen.sharded_state import local_moments
from secondorder.optim._eigen.sharded_step import ShardedOperators
from secondorder.optim._eigen.shards import Shards
from secondorder.optim._eigen.sketches import Sketch

LONGEST = 5.0  # times |G| / |g|, the longest mean input of rows that count


class EigenStep:
    """A step of all matrices that have a gradient: bases are renewed if it is time, then everything moves, then it is noted.

    Args:
        owner: who makes it, for errors.
        matrices: the matrices with a gradient.
        states: their states.
        operands: their weights, biases and gradients, as operators take them.
        control: what finds the step length; see `ops.eigen_step_`.
        shards: the ranks that share the rows of the matrices, if any.
        replay: what operators are told where a CUDA graph captures the step; None: none does.
    """

    def __init__(
        self,
        owner: str,
        matrices: list[Matrix],
        states: list[dict[str, Any]],
        operands: Operands,
        control: Tensor,
        shards: Shards | None,
        replay: Replay | None,
    ):
        self._owner, self._matrices, self._states = owner, matrices, states
        self._operands, self._control, self._replay = operands, control, replay
        self._shards = shards
        self._operators: Any = ops if shards is None else ShardedOperators(shards, matrices, states)
        self._means = [state["mean"] for state in states]
        self._renewal: Renewal | None = None
        for i, (matrix, state) in enumerate(zip(matrices, states, strict=True)):
            bounds = state.get("low", math.inf), state.get("high", -math.inf)
            if bounds[0] <= bounds[1]:
                operands.hold_back(i, matrix, bounds)

    def plan_renewal(self, sketches: Mapping[Matrix, Sketch], hessians: Mapping[Tensor, Tensor]) -> list[str]:
        """Decides what bases are renewed from: the inputs' sketches, and gradients or bias Hessians. Nothing changes yet.

        Args:
            sketches: the sketches of the inputs that forward passes have shown since the last step.
            hessians: bias Hessians, by weight.

        Returns:
            The names of the layers whose inputs are not seen any more.
        """
        self._renewal = Renewal(self._owner, self._matrices, self._states, sketches, hessians, captured=self._replay is not None)
        self._means = self._renewal.means
        return self._renewal.lost

    def renew(self) -> None:
        """Renews the bases if that is planned, unless a number is not finite."""
        renewal = self._renewal
        if renewal is None or not renewal.renewed:
            return
        sums = finite_or_zero([given.sketch.sums for given in renewal.given])
        seen = [i for i, given in enumerate(renewal.given) if given.sketch.rows and self._means[i].numel()]
        inputs = [self._means[i] + sums[i].select(0, -1) / renewal.given[i].sketch.rows for i in seen]
        self._operators.eigen_renew_(
            mean=self._means,
            basis_out=self._of_states("basis_out"),
            basis_in=self._of_states("basis_in"),
            scale_out=self._of_states("scale_out"),
            scale_in=self._of_states("scale_in"),
            first=self._moments("exp_avg"),
            control=self._control,
            grad_weight=self._operands.weight_grads,
            grad_bias=self._operands.bias_grads,
            sketch=sums,
            bias_hessian=finite_or_zero([given.hessian for given in renewal.given]),
            rows=[given.sketch.rows for given in renewal.given],
            share=[given.share for given in renewal.given],
            **({} if self._replay is None else {**self._replay._asdict(), "decay": DECAY}),
        )
        if seen:
            self._bound_means(renewal, seen, inputs)

    def _bound_means(self, renewal: Renewal, seen: list[int], inputs: list[Tensor]) -> None:
        """Takes out of the means what a batch's E[h] is longer than `LONGEST` |G| / |g|, unless the renewal was refused.

        The rows that count in a gradient have |g| |E[h]| <= |G|, or little more: G' = G - g E[h]^T has hardly a share along
        g E[h]^T. Rows that the loss leaves out may be of any length, as padding by -9999 is. With their mean S a would move the
        bias by far more than S h moves the output of a row that counts.

        Args:
            renewal: the renewal that was made.
            seen: the positions of the matrices that have a mean, and whose inputs were seen.
            inputs: E[h] of each of them in this batch.
        """
        gradients = [grads[i] for grads in (self._operands.weight_grads, self._operands.bias_grads) for i in seen]
        of_weights, of_biases, of_inputs = torch.stack(torch._foreach_norm([*gradients, *inputs])).view(3, -1)
        if self._shards is not None:  # only ratios of the gradients' matter, so that copies may count
            of_weights, of_biases = self._shards.norms(torch.stack([of_weights, of_biases]))
        longest, length = LONGEST * of_weights, of_biases * of_inputs
        too_long = (length > longest) & length.isfinite()
        if length.is_cpu and not too_long.any():
            return
        too_long &= (self._control.select(0, UNRENEWED) == 0).to(length.device)
        excess = torch.where(too_long, 1 - longest / length, 0.0).unbind()
        for i, mean, part in zip(seen, inputs, excess, strict=True):
            self._means[i].addcmul_(mean, part * self._share_now(renewal.given[i].share), value=-1)

    def _share_now(self, share: float) -> Any:
        """Returns how much a renewal counts: in a CUDA graph that of the replay, 0 where it renews no bases."""
        if self._replay is None:
            return share
        every, since = self._replay
        steps = self._control.select(0, STEPS)
        renewals = (steps / every).ceil() - renewals_before(since, every)
        now = (1 - DECAY) / (1 - (1 - (1 - DECAY) / share) * DECAY**renewals)
        return torch.where(steps % every == 0, now, 0.0).to(self._means[0])

    def move(self, rates: MatrixRates, group: Mapping[str, Any], enters: bool) -> None:
        """Moves all weights and biases, unless a number is not finite, which `control` tells.

        Args:
            rates: of every weight and bias.
            group: has the betas and eps of all.
            enters: whether a matrix makes its first step after others have trained. The step length is then again that of a
                beginning, at most: it may have grown tenfold on what the others could do alone, as a head does.
        """
        before = self._control.clone() if enters or self._operands.held else None
        if enters:
            self._control.select(0, LENGTH).clamp_(max=FIRST_LENGTH)
        try:
            self._operators.eigen_step_(
                weight=self._operands.weights,
                bias=self._operands.biases,
                first=self._moments("exp_avg"),
                second=self._moments("exp_avg_sq"),
                last=self._moments("last"),
                size=self._of_states("size"),
                control=self._control,
                grad_weight=self._operands.weight_grads,
                grad_bias=self._operands.bias_grads,
                mean=self._means,
                basis_out=self._of_states("basis_out"),
                basis_in=self._of_states("basis_in"),
                lr=rates.weights,
                lr_bias=rates.biases,
                decay=rates.weight_decays,
                decay_bias=rates.bias_decays,
                step=self._of_states("step"),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                renewed=self._renewal is not None,
                **({} if self._replay is None else self._replay._asdict()),
                **({} if rates.on_device is None else {"rate": rates.on_device}),
            )
        except BaseException:
            if before is not None:
                self._control.copy_(before)
            raise
        if before is not None:  # a refused step changes neither the length nor what moves by itself
            refused = self._control[REFUSED] > before[REFUSED]
            self._control[LENGTH] = torch.where(refused, before[LENGTH], self._control[LENGTH])
            for i, held in self._operands.held.items():
                weight = self._operands.weights[i]
                if rates.weights[i]:
                    weight.copy_(torch.where(held.which & ~refused.to(weight.device), held.moved, weight))

    def note_captured(self) -> None:
        """Notes that a CUDA graph has captured the step, which is not made yet."""
        self._operands.write_back()
        if self._renewal is not None:
            self._renewal.note_captured()

    def note_made(self, row_shares: Mapping[Matrix, float]) -> None:
        """Notes in the states that the step was made, and what it has found.

        Args:
            row_shares: the share of rows that was looked up, of the tables that were counted for this step.
        """
        self._operands.write_back()
        for state, mean in zip(self._states, self._means, strict=True):
            state["step"] += 1
            state["mean"] = mean
        for matrix, state in zip(self._matrices, self._states, strict=True):
            if matrix in row_shares:
                state["share"] = row_shares[matrix]
        if self._renewal is not None:
            self._renewal.note_made()

    def _of_states(self, key: str) -> list[Any]:
        """Returns an entry of every matrix' state."""
        return [state[key] for state in self._states]

    def _moments(self, name: str) -> list[Any]:
        """Returns a moment of every matrix, as the operators take it."""
        if self._shards is None:
            return self._of_states(name)
        return [local_moments(matrix, state, name) for matrix, state in zip(self._matrices, self._states, strict=True)]
