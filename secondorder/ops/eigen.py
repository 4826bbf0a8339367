"""EigenAdam: Adam's rule in the eigenbases of both sides of every matrix of a net.

A matrix W [n, p] with gradient G has a basis U [n, ku] of its outputs' side and a basis V [p, kv] of its inputs' side, both
with orthonormal columns, and is given as the rows of `basis_out` = U^T [ku, n] and `basis_in` = V^T [kv, p]. With a bias b
[n], whose gradient is g, the mean input a [p] is taken out of the inputs: G' = G - g a^T, X = [G' V, g]; without one G' = G,
X = G V. The parts of the gradient, in which Adam's rule is applied element by element, are

    C = U^T X [ku, c],    R = X - U C [n, c],    T = U^T G' (I - V V^T) [ku, p],    E = (I - U U^T) G' (I - V V^T) [n, p],

where c = kv + 1 with a bias, else kv; R is missing where ku = n, T where kv = p, E in both cases. A tensor of all parts is flat:
C, R, T, E one after another. With ku = kv = 0 there is E = G alone, and the rule is Adam's.

`control` [8], float64, is what finds the step length: the entries that `CONTROL` names.

A CUDA graph repeats a captured call with the same Python numbers, such as `step` and `share`, though these change from step to
step. `control` counts the steps on the device. So calls to be captured are given `renew_every` > 0, and `since`, the count in
`control` at which their numbers hold. At a count t they then compute with the numbers of t - since steps later, and renew bases
only if `renew_every` divides t. With `renew_every` = 0, the default, numbers hold as they are given.
"""

from collections.abc import Sequence

from torch import Tensor

from secondorder.ops._library import library, operator, without_tangents
from secondorder.reference.eigen import FIRST_LENGTH as FIRST_LENGTH
from secondorder.reference.eigen import LAST_SLOPE as LAST_SLOPE
from secondorder.reference.eigen import LENGTH as LENGTH
from secondorder.reference.eigen import OSCILLATIONS as OSCILLATIONS
from secondorder.reference.eigen import REFUSED as REFUSED
from secondorder.reference.eigen import SLOPE as SLOPE
from secondorder.reference.eigen import STEPS as STEPS
from secondorder.reference.eigen import UNRENEWED as UNRENEWED
from secondorder.reference.eigen import eigen_length as eigen_length
from secondorder.reference.eigen import renewals_before as renewals_before

CONTROL = ("length", "oscillations", "slope", "last_slope", "steps", "refused", "unrenewed", "first_slope")
"""What the entries of a control tensor are.

The length L; K, the steps with a negative slope along the step before; S0 and S1, the averaged slopes along the present step
and along the one before; the steps taken; the steps refused since a gradient was not finite; whether the renewal of the present
step was refused; the slope along the first step, or 0 once the length has proved to be short enough.
"""


@without_tangents
def eigen_sketch_(
    sketch: Tensor, inputs: Tensor, basis: Tensor, shift: Tensor, control: Tensor | None = None, renew_every: int = 0
) -> None:
    """Adds the rows h of a layer's inputs to what a renewal of its basis V needs to know of them.

    With x = h - shift: sketch[:k] += V^T sum_h x x^T and sketch[k] += sum_h x.

    Args:
        sketch: [k + 1, p], contiguous, written in place; zero at first.
        inputs: h [m, p], one row per use of the layer.
        basis: V^T [k, p].
        shift: [p], near the mean input, so that nothing large cancels later; [0] for none.
        control: [8], float64, see `CONTROL`; needed only with `renew_every` > 0.
        renew_every: 0; or > 0 in a CUDA graph: adds nothing unless it divides the steps that `control` counts.
    """
    library.eigen_sketch_(sketch, inputs, basis, shift, control, renew_every)


@operator(
    "eigen_sketch_(Tensor(a!) sketch, Tensor inputs, Tensor basis, Tensor shift, Tensor? control=None, int renew_every=0) -> ()"
)
def _(*args: object) -> None:
    return None


@without_tangents
def eigen_renew_(
    mean: Sequence[Tensor],
    basis_out: Sequence[Tensor],
    basis_in: Sequence[Tensor],
    scale_out: Sequence[Tensor],
    scale_in: Sequence[Tensor],
    first: Sequence[Tensor],
    control: Tensor,
    grad_weight: Sequence[Tensor],
    grad_bias: Sequence[Tensor],
    sketch: Sequence[Tensor],
    bias_hessian: Sequence[Tensor],
    rows: Sequence[int],
    share: Sequence[float],
    renew_every: int = 0,
    since: int = 0,
    decay: float = 0.0,
) -> None:
    """Renews mean inputs and bases by one power iteration each, and turns the first moments with them.

    With the share w and S the averaged variance along V (`scale_in`), and likewise for U with M = G' G'^T, or M = H where there
    is a bias Hessian:

        a <- (1 - w) a + w E[h],    V S <- qr((1 - w) V S + w M V),    M = E[(h - a) (h - a)^T], or G'^T G' without a sketch.

    U' and V' are the new bases. Of the first moments' parts, which are those of `eigen_step_`, C <- A C B, R <- R B and T <- A T,
    with A = U'^T U and B = V^T V' but for the bias' column; E stays, since what turns into the bases, or out of them, is little.

    The columns are orthonormalised in their order, S are their lengths before. One that depends on those before it is drawn
    anew, with S = 0. If a gradient, a sketch or a bias Hessian is not finite nothing changes but
    `control`, which then lets `eigen_step_` refuse the step.

    Args:
        mean: a [p] of every matrix, [0] without a bias; written in place like the five arguments after it.
        basis_out: U^T [ku, n] of every matrix.
        basis_in: V^T [kv, p] of every matrix.
        scale_out: [ku] of every matrix.
        scale_in: [kv] of every matrix.
        first: the first moments of all parts, flat, of every matrix.
        control: [8], float64, what finds the step length; `CONTROL` names its entries.
        grad_weight: G [n, p] of every matrix.
        grad_bias: g [n] of every matrix, [0] without a bias.
        sketch: what `eigen_sketch_` made with a as the shift, [kv + 1, p], of every matrix; [0] where no inputs were seen.
        bias_hessian: H [n, n], symmetric, of every matrix; [0] where U is to be of the gradient.
        rows: how many inputs each sketch has seen; 0 for none.
        share: w in (0, 1] of every matrix.
        renew_every: 0; or > 0 in a CUDA graph: changes nothing unless it divides the steps that `control` counts.
        since: the steps, >= 0, that `control` counted when `share` held; read only with `renew_every` > 0, as is `decay`.
        decay: d in [0, 1). At the r-th renewal w = (1 - d) / (1 - d^r); `share` tells r at `since`, each later renewal adds 1.
    """
    library.eigen_renew_(
        list(mean), list(basis_out), list(basis_in), list(scale_out), list(scale_in), list(first), control,
        list(grad_weight), list(grad_bias), list(sketch), list(bias_hessian), list(rows), list(share), renew_every, since, decay,
    )  # fmt: skip


@operator(
    "eigen_renew_(Tensor(a!)[] mean, Tensor(b!)[] basis_out, Tensor(c!)[] basis_in, Tensor(d!)[] scale_out, Tensor(e!)[] "
    "scale_in, Tensor(f!)[] first, Tensor(g!) control, Tensor[] grad_weight, Tensor[] grad_bias, Tensor[] sketch, Tensor[] "
    "bias_hessian, int[] rows, float[] share, int renew_every=0, int since=0, float decay=0.0) -> ()"
)
def _(*args: object) -> None:
    return None


@without_tangents
def eigen_step_(
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    last: Sequence[Tensor],
    size: Sequence[Tensor],
    control: Tensor,
    grad_weight: Sequence[Tensor],
    grad_bias: Sequence[Tensor],
    mean: Sequence[Tensor],
    basis_out: Sequence[Tensor],
    basis_in: Sequence[Tensor],
    lr: Sequence[float],
    lr_bias: Sequence[float],
    decay: Sequence[float],
    decay_bias: Sequence[float],
    step: Sequence[int],
    beta1: float,
    beta2: float,
    eps: float,
    renewed: bool,
    renew_every: int = 0,
    since: int = 0,
    rate: Tensor | None = None,
) -> None:
    """Makes EigenAdam's step of a whole net: Adam's rule in every part x of the gradients, and its way back to the parameters.

    The parts of a gradient G [n, p], with bases U [n, ku] of its outputs' side and V [p, kv] of its inputs' side, whose columns
    are orthonormal, and with G' = G - g a^T, X = [G' V, g] where there is a bias, else G' = G, X = G V, are

        C = U^T X,    R = X - U C,    T = U^T G' (I - V V^T),    E = (I - U U^T) G' (I - V V^T).

    R is missing where ku = n, T where kv = p, E in both cases. A tensor of all parts is flat: C, R, T, E one after another.

    m = beta1 m + (1 - beta1) x,   v = beta2 v + (1 - beta2) x^2, and with Nesterov's look-ahead and t = `step` from 0

        d = sqrt(1 - beta2^(t+1)) (beta1 m / (1 - beta1^(t+2)) + (1 - beta1) x / (1 - beta1^(t+1)))
        N = clip(d / (sqrt(v) + eps size), +-1.2),

    where size is the largest root mean square of G so far. From N's parts, with Y = (I - U U^T) N_R + U N_C, whose last column
    y belongs to a bias,

        S = (I - U U^T) N_E (I - V V^T) + U N_T (I - V V^T) + Y V^T,       W -= l lr S,    b -= l lr_bias (y - S a),

    l the step length that `control` holds; before that W and b are shrunk by 1 - l lr decay. An element whose gradient is exactly
    zero does not move but for the decay: S is zero there; without bases, ku = kv = 0, it keeps m, v and `last`, too. Then
    `control` learns the slopes of this step: of <x, N>, and of <x, N of the step before>, from `last`, for which of E some evenly
    spread rows stand for all.

    If any gradient is not finite, or too large for its square to be, nothing changes but `control`, which counts it.

    Args:
        weight: W [n, p] of every matrix, contiguous; written in place like the six arguments after it.
        bias: b [n] of every matrix, [0] without one.
        first: the first moments of all parts, flat, of every matrix.
        second: the second moments of the same parts, flat, of every matrix.
        last: the parts C, R, T of N and some rows of its E, flat, of every matrix; zero at first.
        size: [1], float64, of every matrix: the largest root mean square of G so far; zero at first.
        control: [8], float64, what finds the step length; `CONTROL` names its entries.
        grad_weight: G [n, p] of every matrix.
        grad_bias: g [n] of every matrix, [0] without a bias.
        mean: a [p] of every matrix, [0] without a bias.
        basis_out: U^T [ku, n] of every matrix.
        basis_in: V^T [kv, p] of every matrix.
        lr: what multiplies the step length, of every matrix.
        lr_bias: what multiplies the step length, of every bias.
        decay: the weight decay of every matrix, >= 0.
        decay_bias: the weight decay of every bias, >= 0.
        step: t of every matrix, the steps that it has made.
        beta1: the decay of the first moments, in [0, 1).
        beta2: the decay of the second moments, in (0, 1).
        eps: relative to `size`, at least 0.
        renewed: whether bases were renewed since the step before: its N is then unknown.
        renew_every: 0; or > 0 in a CUDA graph: bases count as renewed only if it also divides the steps that `control` counts.
        since: the steps, >= 0, that `control` counted when `step` held; read only with `renew_every` > 0.
        rate: [matrices, 2], float64, further factors of `lr` and `lr_bias` of every matrix, on the device; the step is refused if
            one is negative or not finite. None: no factors.
    """
    library.eigen_step_(
        list(weight), list(bias), list(first), list(second), list(last), list(size), control, list(grad_weight),
        list(grad_bias), list(mean), list(basis_out), list(basis_in), list(lr), list(lr_bias), list(decay),
        list(decay_bias), list(step), beta1, beta2, eps, renewed, renew_every, since, rate,
    )  # fmt: skip


@operator(
    "eigen_step_(Tensor(a!)[] weight, Tensor(b!)[] bias, Tensor(c!)[] first, Tensor(d!)[] second, Tensor(e!)[] last, "
    "Tensor(f!)[] size, Tensor(g!) control, Tensor[] grad_weight, Tensor[] grad_bias, Tensor[] mean, Tensor[] basis_out, "
    "Tensor[] basis_in, float[] lr, float[] lr_bias, float[] decay, float[] decay_bias, int[] step, float beta1, float beta2, "
    "float eps, bool renewed, int renew_every=0, int since=0, Tensor? rate=None) -> ()"
)
def _(*args: object) -> None:
    return None
