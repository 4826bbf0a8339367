"""BackPACK (Dangel, Kunstner & Hennig) as a second opinion on curvatures and input factors, at batches of one and of several.

Its definitions, for a layer of a sequential net, with the loss as reduced by the criterion:

- `KFRA`, `HBP`: the matrix is summed over the batch at the output and, at each module, averaged over it with the instances'
  Jacobians, sum_i J_i^T H J_i / m. For an elementwise function that is H * E[d1 d1^T]: our recursion, at any batch size. `HBP`
  adds diag(sum_i d2_i * delta_i), in absolute values ("pch-abs") or clipped ("pch-clip") after the sum, as ours does, and takes
  only criteria whose Hessian is positive semi-definite.
- `KFLR`, `KFAC`: columns of a square root of each instance's Hessian, exact or sampled, taken back through the net: ours.
- The weight's second factor is E[h h^T], a mean whatever the criterion's reduction: ours for every solver that takes it.
"""

import pytest
import torch
from helpers.curvatures import blocks
from oracles import hessian_block
from torch import nn

from secondorder.curvature import CURVATURES, FisherMC
from secondorder.solvers import Exact

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")  # of BackPACK's, where x asks for no gradient
backpack = pytest.importorskip("backpack")
from backpack import extensions  # noqa: E402
from backpack.extensions.curvature import Curvature  # noqa: E402
from backpack.extensions.secondorder.hbp import HBP  # noqa: E402
from backpack.extensions.secondorder.hbp.hbp_options import (  # noqa: E402
    BackpropStrategy,
    ExpectationApproximation,
    LossHessianStrategy,
)


def hbp(kind):
    """Hessian backpropagation with this modification of the second-order terms."""
    ea = ExpectationApproximation.BOTEV_MARTENS
    return HBP(kind, LossHessianStrategy.SUM, BackpropStrategy.BATCH_AVERAGE, ea, savefield="hbp")


# our curvature -> its extension, a new one each time: they keep what they took back by the addresses of tensors
EXTENSIONS = {
    "gauss-newton": extensions.KFRA,
    "kflr": extensions.KFLR,
    "pch-abs": lambda: hbp(Curvature.PCH_ABS),
    "pch-clip": lambda: hbp(Curvature.PCH_CLIP),
}
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
LOSSES = {
    "cross-entropy": lambda reduction: nn.CrossEntropyLoss(reduction=reduction),
    "mse": lambda reduction: nn.MSELoss(reduction=reduction),
    "bce": lambda reduction: nn.BCEWithLogitsLoss(reduction=reduction),  # of one output, in no recursion
}
RECURSIONS = ("gauss-newton", "pch-abs", "pch-clip")


@pytest.fixture(autouse=True)
def _float64():
    """BackPACK makes the Hessian of MSE in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def problem(activation, loss, m, seed=0):
    torch.manual_seed(seed)
    make = ACTIVATIONS[activation]
    model = nn.Sequential(nn.Linear(4, 6), make(), nn.Linear(6, 5), make(), nn.Linear(5, 1 if loss == "bce" else 3))
    y = {"cross-entropy": torch.randint(3, (m,)), "mse": 3 * torch.randn(m, 3), "bce": torch.randint(2, (m, 1)).double()}
    return model, torch.randn(m, 4), y[loss]


def theirs(model, criterion, x, y, extension):
    """{layer name: (bias block, the weight's two factors)}."""
    model, criterion = backpack.extend(model), backpack.extend(criterion)
    with backpack.backpack(extension):
        criterion(model(x), y).backward()
    field = extension.savefield
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    return {name: (*getattr(layer.bias, field), getattr(layer.weight, field)) for name, layer in layers.items()}


@pytest.mark.parametrize("m", [1, 2, 9])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("curvature", "loss"), [(c, loss) for c in EXTENSIONS for loss in LOSSES if loss != "bce" or c not in RECURSIONS]
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_blocks_and_factors(curvature, activation, loss, reduction, m):
    model, x, y = problem(activation, loss, m)
    criterion = LOSSES[loss](reduction)
    ours = blocks(model, criterion, CURVATURES[curvature], (x, y))
    h = {name: model[: int(name)](x).detach() for name in ours}
    model.zero_grad()
    for name, (block, (left, right)) in theirs(model, criterion, x, y, EXTENSIONS[curvature]()).items():
        torch.testing.assert_close(ours[name], block.detach(), rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(left, block, rtol=0, atol=0)
        moment = Exact().statistics([h[name]], [h[name]])[0]["input_second_moment"]
        torch.testing.assert_close(moment, right.detach(), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss", ["cross-entropy", "mse"])
def test_one_instance_and_no_modification_give_the_true_hessian(loss):
    """What makes `HBP` worth listening to: unmodified, which this package has no curvature for, it is exact for one instance."""
    model, x, y = problem("sigmoid", loss, 1)
    criterion = LOSSES[loss]("mean")
    expected = {name: hessian_block(model, criterion, x, y, f"{name}.bias") for name in ("0", "2", "4")}
    for name, (block, _) in theirs(model, criterion, x, y, hbp(Curvature.HESSIAN)).items():
        torch.testing.assert_close(block.detach(), expected[name])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
def test_sampled_fisher_blocks_have_the_same_expectation(loss, reduction):
    """`KFAC` samples labels by another order of random numbers, so that the blocks agree in expectation only, which is KFLR's."""
    model, x, y = problem("tanh", loss, 9)
    criterion, samples = LOSSES[loss](reduction), 10_000
    exact = blocks(model, criterion, CURVATURES["fisher-exact"], (x, y))
    ours = blocks(model, criterion, FisherMC(samples), (x, y))
    for name, (block, _) in theirs(model, criterion, x, y, extensions.KFAC(mc_samples=samples)).items():
        size = exact[name].norm()
        assert (block - exact[name]).norm() < 0.04 * size
        assert (ours[name] - exact[name]).norm() < 0.04 * size
        assert not torch.allclose(ours[name], exact[name], rtol=1e-6)
