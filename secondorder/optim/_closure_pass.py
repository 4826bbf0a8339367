"""What one call of a closure leaves behind at every linear layer: K-BFGS' inputs, mean preactivations and their gradients."""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.parallel import DistributedDataParallel

from secondorder._distributed import RankReducer, RankTerm
from secondorder._tape import (
    Counting,
    aligned,
    as_weighted,
    claim_product,
    in_recomputation,
    keeps_rows,
    metadata,
    multiplied,
    source_nodes,
)  # fmt: skip
from secondorder._tensors import compute_dtype, flatten_batch, refuse_sparse
from secondorder.criteria import LateMasses, by_position
from secondorder.optim._closure import replaced_backward, torchs_backward
from secondorder.solvers import second_moment


@dataclass(eq=False, slots=True)
class _Use:
    """One call of a layer."""

    order: int  # among all calls of layers
    shape: torch.Size  # of its rows, before they were flattened
    layer: nn.Linear
    input: Tensor  # [m, n_in]
    mean_preactivation: Tensor  # [n_out]
    products: set[Tensor]  # parameters that are multiplied with between the layers before and the input
    weights: Tensor | None = None  # of the rows, [m]; None: 1 each
    total: float | None = None  # of these; None: m

    @property
    def weight(self) -> float:
        """Returns how much its rows count together."""
        return float(len(self.input)) if self.total is None else self.total


class ClosurePass:
    """Records what one call of the closure leaves behind at each linear layer that its loss depends on.

    The hook on a layer adds a zero to its output, the anchor, whose gradient is dL/dz. A call of the layer is recorded once its
    anchor accumulates that gradient, so that neither forward passes without a backward pass count nor torch.autograd.grad.
    Several backward passes, and several calls of a layer, add up to the union of their batches.

    Args:
        layers: the layers to record, with their names for messages.
        tied: layers that are recorded as one of these.
        sign: 1, or -1 if the loss is maximised.
        parameters: whether backward() computes the gradients of parameters, too.
        lend: called after every backward pass that computes none of parameters.
        criterion: its targets have weights, 0 if they are ignored. A layer whose rows belong to the targets counts them by these
            weights. None: all rows count alike.
    """

    def __init__(
        self, layers: Mapping[nn.Linear, str], tied: Mapping[nn.Linear, nn.Linear], sign: float = 1.0, parameters: bool = True,
        lend: Callable[[], None] = lambda: None, criterion: nn.Module | None = None,
    ):  # fmt: skip
        self.layers, self._tied = layers, tied
        self.sign = sign
        self._parameters, self._lend, self.criterion = parameters, lend, criterion
        self._products: set[Tensor] = set()  # parameters that the loss multiplies with between the layers' calls and it
        # Of the criterion's calls whose targets may have weights, None where its rows are in another order, and the loss's nodes.
        self._weighed: list[tuple[LateMasses | None, Node]] = []
        self._key = f"secondorder.pass.{id(self)}"  # of the uses in the metadata of their outputs' autograd nodes
        self._claimed = self._key + ".weight"  # likewise of what these multiply their inputs with
        self._handles: list[Any] = []
        self._anchors: list[Tensor] = []
        self._calls = 0
        self._uses: dict[nn.Linear, list[_Use]] = {}
        self._instances: dict[nn.Linear, int] = {}
        self._unlike: set[nn.Linear] | None = None  # over all ranks
        self._inputs: dict[nn.Linear, Tensor] = {}
        self._mean_inputs: dict[nn.Linear, Tensor] = {}
        # Means over all ranks, once the ranks have been averaged.
        self._mean_preactivations: dict[nn.Linear, Tensor] = {}
        self._second_moments: dict[nn.Linear, Tensor] = {}
        # [n_out] of every layer: dL/dz summed over the instances, L being sign times the loss; a mean where the loss is one.
        self.gradient: dict[nn.Linear, Tensor] = {}

    def again(self, parameters: bool, lend: Callable[[], None]) -> "ClosurePass":
        """Returns one that records another call of the same closure."""
        return ClosurePass(self.layers, self._tied, self.sign, parameters, lend, self.criterion)

    def __enter__(self) -> "ClosurePass":
        layers = [*self.layers, *self._tied]
        self._handles = [layer.register_forward_hook(self._forward, with_kwargs=True) for layer in layers]
        if self.criterion is not None:
            self._handles.append(self.criterion.register_forward_hook(self._record_targets, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._anchors.clear()

    def run(self, closure: Callable[[], Tensor], name: str) -> Tensor:
        """Calls the closure with gradients enabled and returns the loss, detached."""
        with torch.enable_grad(), nullcontext() if self._parameters else replaced_backward(self._backward_to_anchors):
            try:
                loss = closure()
            except (AttributeError, TypeError) as error:
                if self._parameters or "NoneType" not in str(error):
                    raise
                raise RuntimeError(
                    f"{name}.step(): the closure failed in its second call: {error}. Where it reads x.grad of an input: "
                    "backward() computes none in this call. Take it by torch.autograd.grad(loss, x)"
                ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise RuntimeError(f"{name}.step(): expected the closure to return the scalar loss, got {type(loss).__name__}")
        found = [None if masses is None else masses() for masses, _ in self._weighed]
        if any(masses is not None for masses in found):
            graphs = [source_nodes(node, self._key, nearest=False)[0] for _, node in self._weighed]
            uses: list[list[_Use]] = [[metadata(node)[self._key] for node in nodes] for nodes in graphs]
            seen = Counter(use for own in uses for use in own)
            for masses, own in zip(found, uses, strict=True):
                if masses is not None:
                    _weigh([use for use in own if seen[use] == 1], masses)  # in several calls a row has several weights
        self._weighed.clear()
        self._products = self._multiplied(loss.grad_fn)
        return loss.detach()

    @property
    def multiplied(self) -> set[Tensor]:
        """Returns the parameters that the loss has multiplied with outside of these layers' calls."""
        return self._products.union(*(use.products for uses in self._uses.values() for use in uses))

    def _multiplied(self, start: Node | None) -> set[Tensor]:
        """Returns what is multiplied with between a tensor and the calls of layers that it depends on."""
        return multiplied(source_nodes(start, self._key)[2], self._claimed) if self._parameters and start is not None else set()

    def _record_targets(self, criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any) -> None:
        if in_recomputation("the criterion"):
            return
        if torch.is_grad_enabled() and isinstance(loss, Tensor) and loss.grad_fn is not None:
            args, kwargs = by_position(criterion, args, kwargs)
            masses = LateMasses(criterion, (None, *args[1:]), kwargs)
            if masses.possible:
                self._weighed.append((masses if keeps_rows(args[0]) else None, loss.grad_fn))

    def input(self, layer: nn.Linear) -> Tensor:
        """Returns the instances' h [m, n_in]; if they have weights, rows whose plain mean and second moment are the weighted."""
        if layer not in self._inputs:
            uses = self._uses[layer]
            rows, weights = flatten_batch([use.input for use in uses]), [use.weights for use in uses]
            if any(own is not None for own in weights) and self.weight(layer):  # none counts: an error of the loss's own
                pairs = zip(uses, weights, strict=True)
                rows = as_weighted(rows, torch.cat([_ones(use.input) if own is None else own for use, own in pairs]))
            self._inputs[layer] = rows
        return self._inputs[layer]

    def instances(self, layer: nn.Linear) -> int:
        """Returns how many rows the layer's calls have together."""
        return self._instances[layer] if layer in self._instances else sum(len(use.input) for use in self._uses[layer])

    def weight(self, layer: nn.Linear) -> float:
        """Returns how much the rows of the layer's calls count together."""
        return sum(use.weight for use in self._uses[layer])

    def mean_input(self, layer: nn.Linear) -> Tensor:
        """Returns E[h] [n_in]."""
        if layer not in self._mean_inputs:
            self._mean_inputs[layer] = self.input(layer).mean(0)
        return self._mean_inputs[layer]

    def second_moment(self, layer: nn.Linear, average: Tensor | None = None, decay: float = 0.0) -> Tensor:
        """Sets A <- decay A + (1 - decay) E[h h^T], in place where A is given (`average`)."""
        if layer not in self._second_moments:
            return layer_second_moment(layer, self.input(layer), self.mean_input(layer), average, decay)
        moment = self._second_moments[layer]
        return moment if average is None else average.lerp_(moment[: len(average), : len(average)], 1 - decay)

    def mean_square(self, layer: nn.Linear) -> Tensor:
        """Returns E[|h|^2] []."""
        if layer in self._second_moments:
            return self._second_moments[layer].diagonal().sum()
        h = self.input(layer)
        return h.square().sum() / max(len(h), 1)

    def rows(self, layer: nn.Linear, bias: bool) -> Tensor | None:
        """Returns X [m, n] with the second moment X^T X / m, of this process's instances; None: it is over all ranks."""
        if layer in self._second_moments:
            return None
        h = self.input(layer)
        return torch.cat([h, h.new_ones(len(h), 1)], 1) if bias else h

    def mean_preactivation(self, layer: nn.Linear) -> Tensor:
        """Returns E[z] [n_out]."""
        if layer in self._mean_preactivations:
            return self._mean_preactivations[layer]
        uses = self._uses[layer]
        if not self.instances(layer):
            return torch.zeros_like(uses[0].mean_preactivation)
        if len(uses) == 1:
            return uses[0].mean_preactivation
        shares = [use.weight for use in uses] if self.weight(layer) else [float(len(use.input)) for use in uses]
        pairs = [(use, share / sum(shares)) for use, share in zip(uses, shares, strict=True) if len(use.input)]
        return torch.stack([use.mean_preactivation * share for use, share in pairs]).sum(0)

    def unlike(self, first: "ClosurePass") -> set[nn.Linear]:
        """Returns the layers that `first` has called on other numbers of rows, on any rank once the ranks have been averaged."""
        if self._unlike is None:
            return {layer for layer in first.gradient.keys() & self.gradient if self._rows(layer) != first._rows(layer)}
        return self._unlike

    def _rows(self, layer: nn.Linear) -> list[int]:
        """Returns the numbers of rows of a layer's calls, in their order."""
        return [len(use.input) for use in sorted(self._uses.get(layer, []), key=lambda use: use.order)]

    def average(
        self, ranks: RankReducer, loss: float, inputs: Container[nn.Linear] = (), first: "ClosurePass | None" = None
    ) -> float:
        """Makes all means and gradients those over all ranks; returns the mean loss.

        Args:
            ranks: all of them.
            loss: of this one.
            inputs: the layers of whose inputs the means are wanted, too.
            first: an earlier call, for `unlike`.
        """
        unlike = set() if first is None else self.unlike(first)

        def stores(layer: nn.Linear) -> list[tuple[dict[nn.Linear, Tensor], Callable[[nn.Linear], Tensor]]]:
            found: list[Any] = [(self._mean_preactivations, self.mean_preactivation)]
            if layer in inputs:
                found += [(self._mean_inputs, self.mean_input), (self._second_moments, self.second_moment)]
            return found

        def terms() -> list[RankTerm]:
            found = [RankTerm("loss", torch.tensor(loss, dtype=torch.float64, device=ranks.device))]
            for layer, gradient in self.gradient.items():
                name = self.layers[layer]
                count, other = torch.tensor([self.instances(layer), layer in unlike], dtype=torch.float64, device="cpu")
                found += [RankTerm(name, gradient), RankTerm(name, count), RankTerm(name, other)]
                found += [RankTerm(name, mean(layer), self.weight(layer)) for _, mean in stores(layer)]
            return found

        mean_loss, *rest = ranks.average(terms)
        values, instances = iter(rest), {}
        self._unlike = set()
        for layer in self.gradient:
            self.gradient[layer] = next(values)
            instances[layer] = round(float(next(values)) * ranks.size)
            self._unlike |= {layer} if next(values) else set()
            for store, _ in stores(layer):
                store[layer] = next(values)
        self._instances = instances
        return float(mean_loss)

    def same_data(self, first: "ClosurePass", name: str) -> Tensor | bool:
        """Tells whether the first call of a layer, on whose input no covered weight acts, has that of `first`.

        Raises:
            RuntimeError: the layer was called on another number of rows.
        """
        if not first._uses:
            return True
        layer, before = min(((layer, use) for layer, uses in first._uses.items() for use in uses), key=lambda pair: pair[1].order)
        rows = [sum(each._rows(layer)) for each in (first, self)]
        if rows[0] != rows[1]:
            raise RuntimeError(
                f"{name}.step(): expected the closure to evaluate the same mini-batch at every call, but it calls layer "
                f"{self.layers[layer]!r} on {rows[0]} rows, and then on {rows[1]}. Draw the batch outside of the closure. A "
                "solver of differential equations whose steps adapt takes others at other weights, by which no means can be "
                "compared: give it steps of fixed length (method='rk4' in torchdiffeq), or take EigenAdam. No parameter and no "
                "state has changed."
            )
        new, old = min(self._uses[layer], key=lambda use: use.order).input.mean(0), before.input.mean(0)
        # Equal but for the rounding of whatever comes before that layer.
        return (new - old).norm() <= 1e-3 * old.norm()

    @staticmethod
    def check_same_data(same: bool, name: str) -> None:
        """Raises RuntimeError where the data is not the same."""
        if same:
            return
        raise RuntimeError(
            f"{name}.step(): expected the closure to evaluate the same mini-batch at every call, but the first layer's "
            "input has changed. Draw the batch outside of the closure, and freeze what changes with every call, as spectral_norm "
            "does. No parameter and no state has changed."
        )

    def _forward(self, layer: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if (
            not torch.is_grad_enabled() or torch._C._functorch.maybe_current_level() is not None
        ):  # of other tensors than the loss's
            return
        refuse_sparse(self.layers[self._tied.get(layer, layer)], args[0] if args else kwargs["input"])
        anchor = output.new_zeros(()).expand(output.shape).requires_grad_()
        if in_recomputation(f"layer {self.layers[self._tied.get(layer, layer)]!r}"):
            output.add_(anchor)  # so that what follows a frozen layer saves as many tensors as at first
            return
        products = self._multiplied((args[0] if args else kwargs["input"]).grad_fn)
        input, layer = layer_input(layer, args, kwargs), self._tied.get(layer, layer)
        dtype = compute_dtype(layer.weight.dtype)
        mean = flatten_batch([output.detach()]).mean(0, dtype=dtype)
        use = _Use(self._calls, output.shape[:-1], layer, input, mean, products)
        self._calls += 1

        def arrived(anchor: Tensor) -> None:
            gradient, anchor.grad = anchor.grad, None
            assert gradient is not None
            uses = self._uses.setdefault(layer, [])
            if use not in uses:
                uses.append(use)
            total = self.sign * flatten_batch([gradient.detach()]).sum(0, dtype=dtype)
            self.gradient[layer] = self.gradient[layer] + total if layer in self.gradient else total

        anchor.register_post_accumulate_grad_hook(arrived)
        self._anchors.append(anchor)
        if self._parameters and output.grad_fn is not None:
            claim_product(output.grad_fn, self._claimed)
        output.add_(anchor)
        if self.criterion is not None and output.grad_fn is not None:
            metadata(output.grad_fn)[self._key] = use

    def _backward_to_anchors(
        self, tensors: Any, grad_tensors: Any = None, retain_graph: bool | None = None, create_graph: bool = False,
        grad_variables: Any = None, inputs: Any = None,
    ) -> None:  # fmt: skip
        """Calls torch.autograd.backward, but for the anchors alone."""
        if self._anchors:
            torchs_backward(tensors, grad_tensors, retain_graph, create_graph, grad_variables, inputs=self._anchors)
        self._lend()


def layer_input(layer: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Returns the h [m, n_in] of a call, in the state's dtype."""
    h: Tensor = args[0] if args else kwargs["input"]
    return flatten_batch([h.detach()]).to(compute_dtype(layer.weight.dtype))


def _weigh(uses: list[_Use], masses: Tensor) -> None:
    """Has the uses' rows count as their targets do, before the weights move: E[z] is W E[h] + b of these rows."""
    known: dict[int, Counting] = {}
    for use in uses:
        own = aligned(masses, use.shape)
        if own is None:
            continue
        if len(own) not in known:
            known[len(own)] = Counting.of(own)
        counting = known[len(own)]
        use.total = counting.total
        if use.total == 0:
            use.weights = own
        elif counting.kept is not None or counting.weights is not None:
            use.input, use.weights = counting.of_rows(use.input), counting.weights
            h, weights, layer = use.input, _ones(use.input) if use.weights is None else use.weights, use.layer
            mean = (weights / weights.sum()).to(h.dtype) @ h
            bias = None if layer.bias is None else layer.bias.detach().to(h.dtype)
            use.mean_preactivation = nn.functional.linear(mean, layer.weight.detach().to(h.dtype), bias)


def _ones(rows: Tensor) -> Tensor:
    """Returns a weight of 1 for every row."""
    return torch.ones(len(rows), dtype=torch.float64, device=rows.device)


def layer_second_moment(layer: nn.Linear, h: Tensor, mean: Tensor, average: Tensor | None = None, decay: float = 0.0) -> Tensor:
    """Sets A <- decay A + (1 - decay) E[h h^T], in place where A is given (`average`); with a bias h ends in a 1."""
    n = layer.in_features
    moment = second_moment(h) if len(h) else h.new_zeros(n, n)
    if average is None:
        size = n + (layer.bias is not None and layer.bias.requires_grad)
        average = h.new_zeros(size, size)
    average[:n, :n].lerp_(moment, 1 - decay)
    if len(average) > n:
        for border, value in ((average[n, :n], mean), (average[:n, n], mean), (average[n, n], mean.new_ones(()))):
            border.lerp_(value, 1 - decay)
    return average


@contextmanager
def kept_gradients(parameters: Iterable[Tensor], ddp: DistributedDataParallel | None) -> Iterator[Callable[[], None]]:
    """Leaves p.grad as it was before, whatever happens inside, and keeps DistributedDataParallel from averaging gradients.

    Yields:
        A function that gives parameters without a gradient copies of those before: a closure may clip them, say, after a
        backward() that has computed none.
    """
    before = [(p, p.grad) for p in parameters]
    for p, _ in before:
        p.grad = None

    def lend() -> None:
        for p, gradient in before:
            if p.grad is None and gradient is not None:
                p.grad = gradient.clone()

    try:
        with nullcontext() if ddp is None else ddp.no_sync():
            yield lend
    finally:
        for p, gradient in before:
            p.grad = gradient
