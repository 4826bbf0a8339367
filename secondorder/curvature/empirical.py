"""The empirical Fisher blocks, which need only the gradients of the backward pass itself."""

from dataclasses import dataclass

from torch import Tensor, nn

from secondorder._tape import LayerRecord
from secondorder._tensors import flatten_batch, to_compute_dtype
from secondorder.curvature.base import Curvature, register


@dataclass(frozen=True)
class FisherEmpirical(Curvature):
    """The empirical Fisher blocks E[delta delta^T] of the true labels' gradients.

    For a mean loss of m instances, whose delta_i hold 1/m, that is m sum_i delta_i delta_i^T; for a sum it is the sum. Rows that
    are ignored do not count, and with weights w_i of the rows it is sum_i (w_i / W) g_i g_i^T, W their sum.
    """

    grad_outputs = True
    recursive = False
    capturable = True

    def _block(self, record: LayerRecord, above: dict[nn.Linear, Tensor]) -> Tensor:
        return empirical_fisher(record)


def empirical_fisher(record: LayerRecord) -> Tensor:
    """Sums the outer products of the instances' own gradients as the criterion reduces: m sum_i delta_i delta_i^T for a mean.

    m is how many the mean is of: a layer whose rows (tokens, say) are pooled later has more, and each is summed on its own. With
    weights w_i of the rows, by class or 0 where they are ignored, delta_i holds w_i: delta_i delta_i^T / w_i stands for it, and
    sum_i w_i for m. A layer whose rows are others takes the share of rows that count for all of that.

    On the scale of what backward() was called on: a factor on the loss is a factor on the block.

    Args:
        record: what the tape keeps of a layer z = W h + b, its gradients delta = dL/dz [..., n_out] among it.

    Returns:
        The block [n_out, n_out], at least in float32.
    """
    total: Tensor | None = None
    for gradient, loss in record.grad_outputs():
        m = gradient.shape[:-1].numel()
        counting = loss.counting(gradient.shape[:-1])
        rows = counting.of_rows(gradient)
        share = counting.share(rows.shape[:-1].numel(), record.samples)
        delta = to_compute_dtype(flatten_batch([rows], record.samples))
        assert loss.scale is not None
        # delta_i is the gradient of instance i times scale / instances for a mean loss, and times scale / divisor for a sum. The
        # rows of a subsample stand for all m. A negative scale means that the loss is maximised.
        instances: Tensor | float = m if loss.instances is None else loss.instances
        if counting.weights is not None:
            delta = delta * flatten_batch([counting.weights.unsqueeze(1)], record.samples).rsqrt().to(delta.dtype)
        if loss.normalized and (masses := loss.masses()) is not None:
            own = loss.row_masses(gradient.shape[:-1])
            instances = instances * (masses > 0).to(delta.dtype).mean() if own is None else own.sum().to(delta.dtype)
        scale = loss.scale.abs()
        scale = scale.masked_fill(scale == 0, 1)  # a loss that is multiplied by 0, whose delta are 0
        divisor = loss.divisor()
        factor = share * (instances if divisor is None else divisor) / scale
        if m:
            factor = factor + 0 * loss.loss  # if all rows are ignored, the loss is NaN, which the step has to see
        block = (delta.T @ delta) * factor
        total = block if total is None else total + block
    if total is None:  # no backward pass has reached this layer, as with backward(inputs=...)
        n_out = record.layer.out_features
        total = record.weight.new_zeros(n_out, n_out, dtype=record.dtype)
    kept = sum(call.input.shape[:-1].numel() for call in record.calls if call.keeps_gradient)
    if 0 < kept < record.instances:
        # In the first step, calls before the layer's obstacle was known have kept no gradient: the calls that did stand for all.
        total = total * (record.instances / kept)
    return total


register("fisher-empirical", FisherEmpirical())
