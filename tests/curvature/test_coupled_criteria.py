"""Criteria that see a net twice, or compare its instances with one another."""

import warnings

import pytest
import torch
from helpers.curvatures import assert_blocks, gauss_newton_blocks, network
from torch import nn
from torch.nn import functional as F

import secondorder as so
from secondorder._layers import linear_layers
from secondorder._tape import Tape
from secondorder.criteria import FunctionCriterion
from secondorder.curvature import CURVATURES, KFLRCurvature


def blocks_of(model, criterion, curvature, compute):
    layers = linear_layers(model)
    tape = Tape(layers, criterion, curvature.tape_options())
    compute().backward()
    hessians = curvature.bias_hessians(tape.records())
    tape.remove()
    return {layers[layer]: h for layer, h in hessians.items()}


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, z):
        return self.function(z)


BOTH_SIDES = {
    "two calls": lambda criterion, net, a, b: criterion(net(a), net(b)),
    "one call": lambda criterion, net, a, b: criterion(*net(torch.cat([a, b])).chunk(2)),
    "by name": lambda criterion, net, a, b: criterion(target=net(a), input=net(b)),
    "an index": lambda criterion, net, a, b: criterion(net(torch.cat([a, b]))[: len(a)], net(torch.cat([a, b]))[len(a) :]),
}


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("function", ["numbers", "sigmoid", "pairs"])
def test_a_mean_square_of_functions_of_two_outputs_has_the_curvature_of_both(function, calls):
    """Of one number for each instance, behind a final function, and of more numbers than the layer has."""
    outputs = 1 if function == "numbers" else 3
    of = {"numbers": lambda z: z.squeeze(1), "sigmoid": torch.sigmoid, "pairs": lambda z: z.repeat(1, 2) * z[:, :1]}[function]
    net, (a, b), criterion = network([4, 6, outputs], nn.Tanh()), torch.randn(2, 5, 4).double(), nn.MSELoss()

    def compute():
        return criterion(of(net(a)), of(net(b))) if calls == 2 else criterion(*map(of, net(torch.cat([a, b])).chunk(2)))

    model = nn.Sequential(*net, Of(lambda z: of(z).unsqueeze(1) if function == "numbers" else of(z)))
    zero = torch.zeros_like(model(a)).detach()
    sides = [gauss_newton_blocks(model, criterion, x, zero) for x in (a, b)]
    for name in ("kflr", "fisher-exact"):
        actual = blocks_of(net, criterion, CURVATURES[name], compute)
        assert_blocks(actual, {name: block + sides[1][name] for name, block in sides[0].items()})


@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.MSELoss(reduction="sum"), FunctionCriterion(F.mse_loss)], ids=str)
@pytest.mark.parametrize("way", BOTH_SIDES)
def test_a_mean_square_of_two_outputs_has_the_curvature_of_both(way, criterion):
    """Of the difference, with every row of the layers by itself, as of a layer that is used several times."""
    net, (a, b) = network([4, 6, 3], nn.Tanh()), torch.randn(2, 5, 4).double()
    zero, scale = torch.zeros(5, 3).double(), 15 if getattr(criterion, "reduction", "mean") == "sum" else 1
    sides = [gauss_newton_blocks(net, nn.MSELoss(), x, zero) for x in (a, b)]
    expected = {name: scale * (block + sides[1][name]) for name, block in sides[0].items()}
    for name in ("kflr", "fisher-exact"):
        assert_blocks(blocks_of(net, criterion, CURVATURES[name], lambda: BOTH_SIDES[way](criterion, net, a, b)), expected)


FIRST, SECOND = torch.tensor([0, 3, 3, 5, 2, 0]), torch.tensor([3, 0, 1, 4, 2, 3])  # one row is compared with itself
SIDES = {
    "pairs": lambda z: (z[FIRST], z[SECOND]),
    "neighbours": lambda z: (z[1:], z[:-1]),
    "one with all": lambda z: (z[:1].expand(6, -1), z),
    "in three dimensions": lambda z: (z.view(2, 3, 3)[:, [0, 0]], z.view(2, 3, 3)[:, 1:]),
}


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("sides", SIDES)
def test_rows_that_are_compared_several_times_have_the_sum_over_all_comparisons(sides, outputs):
    """Exactly; a row that is compared with itself has none."""
    torch.manual_seed(0)
    net, x, criterion = network([4, 6, 3], nn.Tanh()), torch.randn(6, 4).double(), nn.MSELoss()
    of = SIDES[sides] if outputs == 3 else lambda z: [side[..., 0] for side in SIDES[sides](z)]
    position = torch.arange(18.0).view(6, 3)
    first, second = (side.flatten() for side in of(position))
    uses = torch.zeros(18).double()
    for a, b in zip(first.long().tolist(), second.long().tolist(), strict=True):
        if a != b:
            uses[a] += 2 / len(first)
            uses[b] += 2 / len(first)
    expected = {}
    for name in ("0", "2"):
        rows = []
        for i in range(6):
            below = net[0](x[i]) if name == "0" else net[:3](x[i])
            above = net[1:] if name == "0" else nn.Identity()
            rows.append(torch.func.jacrev(above)(below.detach()))
        jacobian = torch.cat(rows)  # [18, n_out]
        expected[name] = (jacobian.T * uses) @ jacobian
    for name in ("kflr", "fisher-exact"):
        actual = blocks_of(net, criterion, CURVATURES[name], lambda: criterion(*of(net(x))))
        assert_blocks(actual, {name: block.detach() for name, block in expected.items()})


WITHIN = {
    "halves of every row": lambda z: (z[:, :2], z[:, 2:]),
    "an output and the next": lambda z: (z[:, 0], z[:, 1]),
    "one output and all": lambda z: (z[:, :1].expand(-1, 4), z),
    "halves of rows used again": lambda z: (z[[0, 1, 2, 0], :2], z[[0, 1, 3, 4], 2:]),
    "three axes": lambda z: z.view(2, 3, 4)[:, :2].unbind(1),
}


class Decoded(nn.Module):
    """Of every row of its input, several rows."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x, shift=0):
        h = torch.tanh(self.a(x) + shift)
        return self.b(h.unsqueeze(1) * torch.arange(1.0, 4).view(3, 1).double()).view(-1, 4)


@pytest.mark.parametrize("way", [*WITHIN, "rows of one row before"])
def test_numbers_of_one_row_that_are_compared_are_coupled(way):
    """As two numbers of one row of any layer are."""
    torch.manual_seed(0)
    x, criterion = torch.randn(6, 4).double(), nn.MSELoss()
    net, of = (
        (network([4, 6, 4], nn.Tanh()), WITHIN[way])
        if way in WITHIN
        else (Decoded().double(), lambda z: z.view(6, 3, 4)[:, :2].unbind(1))
    )

    def differences(shift):
        a, b = of(net[1:](net[0](x) + shift) if way in WITHIN else net(x, shift))
        return (a - b).flatten()

    jacobian = torch.func.jacrev(differences)(torch.zeros(6, 6 if way in WITHIN else 5).double()).detach()
    expected = 2 / len(jacobian) * torch.einsum("rik,ril->kl", jacobian, jacobian)
    for name in ("kflr", "fisher-exact"):
        actual = blocks_of(net, criterion, CURVATURES[name], lambda: criterion(*of(net(x))))
        torch.testing.assert_close(actual["0" if way in WITHIN else "a"], expected)


def test_labels_are_drawn_for_both_sides():
    net, (a, b), criterion = network([4, 6, 3], nn.Tanh()), torch.randn(2, 5, 4).double(), nn.MSELoss()
    compute = lambda: criterion(net(a), net(b))  # noqa: E731
    expected = blocks_of(net, criterion, CURVATURES["fisher-exact"], compute)
    actual = blocks_of(net, criterion, so.curvature.FisherMC(20000), compute)
    for name, block in expected.items():
        assert (actual[name] - block).norm() < 0.05 * block.norm()


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()], ids=str)
def test_other_criteria_with_a_target_that_is_trained_are_refused(criterion):
    """They are not convex in both."""
    net, (a, b) = network([4, 6, 3], nn.Tanh()), torch.randn(2, 5, 4).double()
    for name in ("kflr", "fisher-exact", "fisher-mc"):
        with pytest.raises(ValueError, match="pch-abs"):
            blocks_of(net, criterion, CURVATURES[name], lambda: criterion(net(a), net(b).softmax(1)))


@pytest.mark.parametrize("curvature", ["kflr", "fisher-exact", "fisher-mc", "pch-abs"])
def test_a_target_of_another_net_is_fixed_whether_it_is_detached_or_not(curvature):
    """In single precision autograd's Hessians of a certain classifier are not positive semi-definite by rounding."""
    net, teacher = (network([4, 6, 3], nn.Tanh()).float() for _ in range(2))
    x, criterion, found = torch.randn(5, 4), nn.CrossEntropyLoss(), []
    target = (5 * teacher(x)).softmax(1)
    for y in (target.detach(), target):
        torch.manual_seed(0)  # of the labels that are drawn
        compute = lambda y=y: criterion(300 * net(x), y)  # noqa: E731
        found.append(blocks_of(net, criterion, CURVATURES[curvature], compute))
    for name, block in found[0].items():
        assert torch.equal(found[1][name], block)


@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.BCEWithLogitsLoss()], ids=str)
@pytest.mark.parametrize("curvature", ["kflr", "fisher-exact"])
def test_one_number_without_a_dimension_has_the_curvature_of_one_instance(curvature, criterion):
    """As of the last batch, of one row, behind squeeze()."""
    net, x, y = network([4, 6, 1], nn.Tanh()), torch.randn(1, 4).double(), torch.rand(1, 1).double()
    expected = gauss_newton_blocks(net, criterion, x, y)
    assert_blocks(blocks_of(net, criterion, CURVATURES[curvature], lambda: criterion(net(x).squeeze(), y.squeeze())), expected)


@pytest.mark.parametrize("curvature", ["pch-abs", "gauss-newton"])
def test_a_formula_takes_no_target_for_fixed_that_is_trained(curvature):
    """The Hessian of (z - z^2 / 4)^2 is another one than that of (z - y)^2."""
    criterion, x, net = nn.MSELoss(), torch.randn(5, 4).double(), network([4, 3], nn.Tanh())

    def compute():
        z = net(x)
        return criterion(z, z.square() / 4)

    z = net(x).detach()
    second = 2 * (1 - z / 2) ** 2 - (z - z.square() / 4)  # of each instance's loss by its z, times 1 / 15 for the mean
    expected = second.sum(0) / 15
    assert (second < 0).any()
    assert (expected > 0).all()
    (block,) = blocks_of(net, criterion, CURVATURES[curvature], compute).values()
    torch.testing.assert_close(block, torch.diag(expected))


def differences(scores, target):
    """Of one output: which of two instances is the higher."""
    return F.softplus((scores.mT - scores) * (target - target.mT).sign()).mean()


def centred(z, target):
    return ((z - z.mean(0) - target) ** 2).mean()


COMPARING = {
    "ranking": (FunctionCriterion(differences), 1),
    "centred": (FunctionCriterion(centred), 3),
    "absolute values": (nn.L1Loss(), 3),
    "linear": (FunctionCriterion(lambda z, y: (z * y).sum()), 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", COMPARING)
def test_columns_of_a_hessian_that_is_zero_are_gradients(name, dtype):
    """All layers get their empirical Fisher blocks, as the last one does from the recursion."""
    criterion, outputs = COMPARING[name]
    net = network([4, 6, outputs], nn.Tanh()).to(dtype)
    x, y = torch.randn(7, 4).to(dtype), torch.randn(7, outputs).to(dtype)
    compute = lambda: criterion(net(x), y)  # noqa: E731
    expected = blocks_of(net, criterion, CURVATURES["fisher-empirical"], compute)
    actual = blocks_of(net, criterion, KFLRCurvature(), compute)
    for layer, block in expected.items():
        assert block.any()
        torch.testing.assert_close(actual[layer], block)
    top = blocks_of(net, criterion, CURVATURES["pch-abs"], compute)
    torch.testing.assert_close(top["2"], expected["2"])


def test_an_optimizer_says_once_that_a_criterion_has_no_curvature():
    net = network([4, 6, 3], nn.Tanh()).float()
    optimizer, x, y, losses = so.KFLR(net, nn.L1Loss()), torch.randn(40, 4), torch.randn(40, 3), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(10):
            optimizer.zero_grad()
            losses.append(optimizer.criterion(net(x), y))
            losses[-1].backward()
            optimizer.step()
    assert [("L1Loss() is zero" in str(w.message)) for w in caught] == [True]
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.filterwarnings("ignore:secondorder")
@pytest.mark.parametrize("optimizer", [so.LayerwiseNewton, so.KFRA, so.KFLR])
@pytest.mark.parametrize("name", ["ranking", "centred"])
def test_criteria_that_compare_instances_train(name, optimizer):
    torch.manual_seed(1)
    criterion, outputs = COMPARING[name]
    net, x = network([5, 8, outputs], nn.Tanh()).float(), torch.randn(50, 5)
    trained, y, losses = optimizer(net, criterion), (x @ torch.randn(5, outputs)).tanh(), []
    for _ in range(40):
        trained.zero_grad()
        losses.append(criterion(net(x), y))
        losses[-1].backward()
        trained.step()
    assert losses[-1] < 0.5 * losses[0]


def test_a_mean_of_all_outputs_may_be_compared_with_every_target():
    torch.manual_seed(0)
    model, x, y = network((4, 5, 2), nn.Tanh()), torch.randn(6, 4).double(), torch.randn(6, 2).double()
    optimizer = so.KFLR(model, nn.MSELoss())
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = optimizer.criterion(model(x).mean().expand(6, 2), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    floor = (y - y.mean()).square().mean().item()
    assert losses[-1] - floor < 0.1 * (losses[0] - floor)
