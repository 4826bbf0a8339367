"""EigenAdam's step against its specification in float64, and the specification against the algorithm's own words."""

import pytest
import torch
from helpers.eigen_operators import DTYPES, SIZES, STEP, cast, compare, controls, coordinates, lengths, matrix, step

from secondorder import ops, reference
from secondorder.reference.eigen_rows import gradient_of_rows, parts_of_rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_equal_the_specification(dtype):
    original = [matrix(*size, seed=i) for i, size in enumerate(SIZES)]
    matrices, plain, exact = cast(original, dtype), cast(original, dtype), cast(original, torch.float64)
    mine, theirs, oracle = controls(), controls(), controls()
    for t in range(3):
        for library, each, control in ((ops, matrices, mine), (reference, plain, theirs), (reference, exact, oracle)):
            step(library, each, control, t, renewed=t == 1)
    compare(STEP, matrices, plain, exact, ulps=64 if dtype == torch.float32 else 256)
    torch.testing.assert_close(mine, oracle, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0)


def test_a_step_without_matrices_counts():
    """As everywhere: on a GPU, too, `control` alone tells of it."""
    found = []
    for library in (ops, reference):
        control = controls()
        library.eigen_step_(*[[]] * 6, control, *[[]] * 10, 0.9, 0.99, 1e-8, False)
        found.append(control)
    assert torch.equal(*found)
    assert found[0][ops.CONTROL.index("steps")] == controls()[ops.CONTROL.index("steps")] + 1


@pytest.mark.parametrize("name", ops.CONTROL)
def test_no_entry_of_control_is_idle(name):
    """Each changes what a step makes of the others or of the weights; but for a count, which optimizers read."""
    original, index, made = matrix(20, 30, 8, 8, True), ops.CONTROL.index(name), []
    for value in (None, 10.0, 1e6):
        (own,), control = cast([original], torch.float64), controls()
        control[ops.CONTROL.index("last_slope")] = 1e4
        control[ops.CONTROL.index("steps")] = 10 if name == "first_slope" else 20  # it is of use while the length rises
        control[index] = control[index] if value is None else value
        step(ops, [own], control)
        made.append(([*control[:index], *control[index + 1 :]], own["weight"].tolist()))
    assert (made[0] != made[1] or made[0] != made[2]) == (name != "refused")


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
        ({"last_slope": -FAR, "slope": -FAR, "first_slope": FAR, "length": 0.005}, 1 / 0.7, False),  # and takes a factor back
        ({"last_slope": -FAR, "slope": -FAR, "first_slope": FAR, "length": 0.008}, 1.25, True),  # the last one
        ({"last_slope": -FAR, "slope": FAR, "first_slope": 0.0}, 1.0, True),  # an earlier one's was
    ],
)
def test_a_rising_length_is_shortened_where_gradients_after_steps_point_back_or_grow(library, entries, factor, proved):
    start = entries.get("length", 0.01)
    for t in (1, 14):
        after = control_after(library, steps=t, **entries)
        assert after["length"] == pytest.approx(start * factor, rel=1e-15)
        assert after["first_slope"] == (0 if proved else entries["first_slope"])
    after = control_after(library, steps=15, **entries)  # it has risen: the rule of every later step holds
    assert 0.97 < after["length"] / start < 1.06
    assert after["first_slope"] == entries["first_slope"]


@pytest.mark.parametrize("library", [ops, reference], ids=["ops", "reference"])
def test_the_first_slope_is_kept(library):
    after = control_after(library)
    assert after["first_slope"] == after["slope"] != 0
    assert after["length"] == 0.01


@pytest.mark.parametrize("size", [(40, 50, 8, 8, True), (33, 30, 8, 30, False), (9, 40, 9, 8, True)], ids=str)
def test_parts_are_the_gradient_in_other_coordinates(size):
    """Without Adam's rule what goes there and back is the gradient itself, of W and of b, in the metric of centred inputs."""
    each = matrix(*size)
    g, x, u, v = coordinates(each)
    shapes = reference.eigen_shapes(*size)
    parts = {part: value for part, value in parts_of_rows(g, x, u.T @ x, u.T @ g, u, v).items() if part in shapes}
    assert [part.numel() for part in parts.values()] == [length for length in lengths(*size) if length]
    s, y = gradient_of_rows(parts, {part: u.T @ value for part, value in parts.items() if len(value) == size[0]}, u, v)
    centred = each["grad_weight"]
    if size[4]:
        centred = centred - torch.outer(each["grad_bias"], each["mean"])
        torch.testing.assert_close(y[:, -1], each["grad_bias"])
    torch.testing.assert_close(s, centred)
    # The parts are orthogonal: their squares add up to the gradient's.
    total = sum(part.square().sum() for part in parts.values())
    torch.testing.assert_close(total, centred.square().sum() + each["grad_bias"].square().sum())


def test_without_bases_it_is_adam_with_a_look_ahead():
    """From the moments of torch's Adam."""
    torch.manual_seed(0)
    values, grads = torch.randn(6, 4, dtype=torch.float64), torch.randn(30, 6, 4, dtype=torch.float64)
    p = torch.nn.Parameter(values.clone())
    optimizer = torch.optim.Adam([p], lr=1.0, betas=(0.9, 0.95), eps=0)
    own = matrix(6, 4, 0, 0, False) | {"weight": values.clone(), "size": torch.zeros(1, dtype=torch.float64)}
    own |= {"first": torch.zeros(24, dtype=torch.float64), "second": torch.zeros(24, dtype=torch.float64)}
    control = controls()
    for t, g in enumerate(grads):
        own["grad_weight"] = g
        before, length = own["weight"].clone(), float(control[0] / (1 + control[1] / 25).sqrt())
        step(ops, [own], control, t, decay=0.0)
        p.grad = g
        optimizer.step()
        state = optimizer.state[p]
        ahead = 0.9 * state["exp_avg"] / (1 - 0.9 ** (t + 2)) + 0.1 * g / (1 - 0.9 ** (t + 1))
        expected = (ahead / (state["exp_avg_sq"] / (1 - 0.95 ** (t + 1))).sqrt()).clamp(-1.2, 1.2)
        torch.testing.assert_close((before - own["weight"]) / length, expected, rtol=1e-5, atol=1e-6)


def test_what_has_no_gradient_does_not_move():
    """Single elements among others, whole rows and whole columns; the bias of a row, too."""
    own = cast([matrix(40, 50, 8, 8, True)], torch.float32)[0]
    own["grad_weight"][7] = own["grad_weight"][:, 9] = 0  # and a tenth of the others
    own["grad_bias"][7] = 0
    still = own["grad_weight"] == 0
    before = own["weight"].clone(), own["bias"].clone()
    step(ops, [own], controls(), decay=0.0)
    assert torch.equal(own["weight"] == before[0], still)
    assert (own["bias"] == before[1]).nonzero().tolist() == [[7]]
