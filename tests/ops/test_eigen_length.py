"""EigenAdam's step length, as control finds it from slopes."""

import math
from itertools import pairwise

import pytest
import torch
from helpers.eigen_operators import cast, matrix, step

from secondorder import EigenAdam, ops, reference

FAR = 1e9  # of an average: next to it the slopes of one step are nothing


def control_after(library, **entries):
    """The control after one step from these entries, by their names."""
    (own,), control = cast([matrix(20, 30, 8, 8, True)], torch.float64), torch.zeros(len(ops.CONTROL), dtype=torch.float64)
    for name, value in {"length": 0.01, **entries}.items():
        control[ops.CONTROL.index(name)] = value
    step(library, [own], control)
    return dict(zip(ops.CONTROL, control.tolist(), strict=True))


@pytest.mark.parametrize("library", [ops, reference], ids=["ops", "reference"])
@pytest.mark.parametrize(
    ("entries", "factor", "proved"),
    [
        ({"last_slope": -FAR, "slope": FAR, "first_slope": 2 * FAR}, 0.7, False),  # next gradients point back
        ({"last_slope": FAR, "slope": 2 * FAR, "first_slope": FAR}, 0.7, False),  # they grow
        ({"last_slope": FAR, "slope": FAR, "first_slope": 2 * FAR}, 1.0, False),  # they do neither
        ({"last_slope": -FAR, "slope": -FAR, "first_slope": FAR}, 1.0, True),  # this step's slope is above a tenth of the average
        ({"last_slope": -FAR, "slope": FAR, "first_slope": 0.0}, 1.0, True),  # an earlier one's was
    ],
)
def test_a_rising_length_is_shortened_where_no_step_pointed_along_the_next_gradient(library, entries, factor, proved):
    for t, expected in ((1, factor), (14, factor), (15, None)):
        after = control_after(library, steps=t, **entries)
        if expected is not None:
            assert after["length"] == pytest.approx(0.01 * expected, rel=1e-15)
            assert after["first_slope"] == (0 if proved else entries["first_slope"])
        else:  # when it has risen, the rule of every later step holds
            assert after["length"] != pytest.approx(0.01 * 0.7, rel=1e-3)
            assert after["first_slope"] == entries["first_slope"]


@pytest.mark.parametrize("library", [ops, reference], ids=["ops", "reference"])
def test_the_first_slope_is_kept(library):
    after = control_after(library)
    assert after["first_slope"] == after["slope"] != 0
    assert after["length"] == 0.01


class Sine(torch.nn.Module):
    def forward(self, x):
        return torch.sin(30 * x)


def siren(width):
    """Three layers of sines with the first weights of Sitzmann et al."""
    layers = []
    for i, (n_in, n_out) in enumerate(pairwise([2, width, width, width, 1])):
        layer = torch.nn.Linear(n_in, n_out)
        bound = 0.5 if i == 0 else math.sqrt(6 / width) / 30
        torch.nn.init.uniform_(layer.weight, -bound, bound)
        layers += [layer, Sine()]
    return torch.nn.Sequential(*layers[:-1])


def test_a_net_whose_loss_is_far_steeper_than_others_trains():
    """Sines of 30 times their input: the length that suits other nets is several times the size of these weights."""
    torch.manual_seed(0)
    net, axis = siren(64), torch.linspace(-1, 1, 24)
    x = torch.cartesian_prod(axis, axis)
    y = torch.exp(-4 * x.square().sum(1, keepdim=True)) + 0.3 * torch.sign(x[:, :1] + x[:, 1:] / 2)
    optimizer = EigenAdam(net)
    for _ in range(120):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3 * y.var().item()
