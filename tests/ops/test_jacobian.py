import pytest
import torch
from helpers.kernels import needs_kernels
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_as_accurate
from torch.library import opcheck

from secondorder import ops, reference

OPERATOR = torch.ops.secondorder.jacobian_rows_.default
# (a, b): around the widths of vectors and register tiles
SIZES = [(1, 1), (1, 32), (32, 1), (32, 2), (33, 3), (100, 7), (5, 3), (3, 17), (7, 33), (9, 24), (17, 65), (32, 32), (130, 131)]


def none(dtype=torch.float64):
    return torch.empty(0, dtype=dtype)


def natural():
    return none(torch.int64)


def without_kernel(*arguments):
    """What a device gets for which there is no kernel, here on the CPU."""
    OPERATOR.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments)


def exact(out, left, right, rows, start, offset):
    """In float64, residual by residual and row by row."""
    result = out.double().clone()
    places = list(zip(start, offset, strict=True))
    for i, (x, y, index, (row, column)) in enumerate(zip(left, right, rows, places, strict=True)):
        y = torch.ones(len(x), 1) if y.dim() == 1 else y
        m = len(x) if index.dim() == 1 else len(index)
        for j in range(m):
            gradient = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
            for r in [j] if index.dim() == 1 else index[j].tolist():
                if r < len(x):
                    gradient += torch.outer(x[r].double(), y[r].double())
            target = result[row + j, column : column + gradient.numel()]
            target.copy_(target + gradient.flatten() if i and places[i - 1] == (row, column) else gradient.flatten())
    return result


def some_rows(r, m, t):
    """A quarter of them none."""
    return torch.where(torch.rand(m, t) < 0.25, r, torch.randint(max(r, 1), (m, t)) if r else r)


def block(m, a, b, kinds, dtype):
    """left, right and rows of the pieces of one block; a kind: T, or None for the natural order."""
    pieces = []
    for i, t in enumerate(kinds):
        r = m if t is None else m + 3 - i % 3
        right = none(dtype) if b == 1 and i % 2 else torch.randn(r, b, dtype=torch.float64).to(dtype)
        rows = natural() if t is None else some_rows(r, m, t)
        pieces.append((torch.randn(r, a, dtype=torch.float64).to(dtype), right, rows))
    return [list(each) for each in zip(*pieces, strict=True)]


def assert_correct(out, *arguments):
    """The operator, what it is without a kernel, and its twin; everything around the blocks stays."""
    expected = exact(out, *arguments)
    results = [out.clone() for _ in range(3)]
    for function, result in zip([reference.jacobian_rows_, ops.jacobian_rows_, without_kernel], results, strict=True):
        function(result, *arguments)
        assert_as_accurate(result.nan_to_num(7.0), results[0].nan_to_num(7.0), expected.nan_to_num(7.0), ulps=32)
    return results[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_a_loop_over_rows(size, dtype):
    a, b = size
    m = 7
    for kinds in ([None], [1], [3], [None, 1, 2, None, 4], [None] * 19, [0], [0, None]):
        pieces = block(m, a, b, kinds, dtype)
        out = torch.full((m + 4, a * b + 5), float("nan"), dtype=dtype)
        result = assert_correct(out, *pieces, [3] * len(kinds), [4] * len(kinds))
        inside = torch.zeros_like(out, dtype=torch.bool)
        inside[3 : 3 + m, 4 : 4 + a * b] = True
        assert torch.equal(result.isnan(), ~inside)


@given(data=st.data(), double=st.booleans(), threads=st.sampled_from([1, 2, 5]))
def test_a_whole_net(data, double, threads):
    """Blocks of several sizes side by side, and for some of the rows alone."""
    dtype = torch.float64 if double else torch.float32
    sizes = st.sampled_from([0, 1, 2, 3, 5, 8, 17, 33])
    net = data.draw(st.lists(st.tuples(sizes, sizes), max_size=4))
    m = data.draw(st.sampled_from([0, 1, 2, 33]))
    out = torch.randn(2 * m + 1, sum(a * b + 1 for a, b in net) + 9, dtype=dtype)[:, :-3]  # a row's stride is larger than P
    lists, starts, offsets, column = ([], [], []), [], [], 2
    for a, b in net:
        for row in data.draw(st.sampled_from([[0], [m], [0, m]])):
            kinds = data.draw(st.lists(st.sampled_from([None, 0, 1, 2, 5]), min_size=1, max_size=5))
            for joined, pieces in zip(lists, block(m, a, b, kinds, dtype), strict=True):
                joined += pieces
            starts += [row] * len(kinds)
            offsets += [column] * len(kinds)
        column += a * b + 1  # so that an empty block is not at the place of the next one
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_correct(out, *lists, starts, offsets)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_many_rows_among_threads(threads):
    m, a, b = 300, 32, 32
    left, right = torch.randn(6, m, a), torch.randn(6, m, b)
    index = torch.stack([torch.randperm(m + 1)[:m] for _ in range(6)]).unsqueeze(2)
    padded_left, padded_right = (torch.cat([t, torch.zeros(6, 1, t.shape[2])], 1).double() for t in (left, right))
    expected = sum(
        torch.einsum("ma,mb->mab", x[i[:, 0]], y[i[:, 0]]) for x, y, i in zip(padded_left, padded_right, index, strict=True)
    )
    out = torch.empty(m, a * b)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ops.jacobian_rows_(out, list(left), list(right), list(index), [0] * 6, [0] * 6)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out.double(), expected.flatten(1), rtol=1e-5, atol=1e-5)


def test_strides():
    """Any stride from row to row, and any within a row; the rows' table in any layout."""
    x, y, index = torch.randn(5, 4).double(), torch.randn(5, 6).double(), some_rows(5, 7, 3)
    expected = exact(torch.zeros(7, 24), [x], [y], [index], [0], [0])
    wide = torch.full((5, 9), float("nan"), dtype=torch.float64)
    for left, right, rows in [
        (x.T.contiguous().T, wide[:, 1:7].copy_(y), index.T.contiguous().T),
        (torch.stack([x, x], 2)[:, :, 1], torch.cat([y, y])[:5], torch.stack([index, index], 1)[:, 0]),
    ]:
        out = torch.zeros(7, 24, dtype=torch.float64)
        ops.jacobian_rows_(out, [left], [right], [rows], [0], [0])
        torch.testing.assert_close(out, expected)
    out = torch.zeros(7, 24, dtype=torch.float64)
    ops.jacobian_rows_(out, [x[:1].expand(5, 4)], [y[:1].expand(5, 6)], [index], [0], [0])
    torch.testing.assert_close(out, exact(out, [x[:1].expand(5, 4)], [y[:1].expand(5, 6)], [index], [0], [0]))


def test_rows_that_are_none_keep_what_is_not_finite_out():
    x, y = torch.full((1, 3), float("nan")), torch.full((1, 9), float("inf"))
    for function in (ops.jacobian_rows_, reference.jacobian_rows_, without_kernel):
        out = torch.ones(2, 27)
        function(out, [x], [y], [torch.tensor([[1], [0]])], [0], [0])
        assert torch.equal(out[0], torch.zeros(27))
        assert out[1].isnan().all()


def test_blocks_are_written_one_after_another():
    """Pieces at one place that do not follow one another are blocks of their own, and the last one stays."""
    x, y = torch.randn(3, 40, 2), torch.randn(3, 40, 9)
    for function in (ops.jacobian_rows_, reference.jacobian_rows_, without_kernel):
        out = torch.zeros(41, 18)
        function(out, list(x), list(y), [natural()] * 3, [0, 1, 0], [0, 0, 0])
        torch.testing.assert_close(out[:40], torch.einsum("ma,mb->mab", x[2], y[2]).flatten(1))
        torch.testing.assert_close(out[40], torch.outer(x[1, 39], y[1, 39]).flatten())


def test_nothing_to_write():
    out = torch.randn(3, 4)
    before = out.clone()
    ops.jacobian_rows_(out, [], [], [], [], [])
    ops.jacobian_rows_(out, [torch.zeros(0, 4)], [none(torch.float32)], [natural()], [3], [0])
    ops.jacobian_rows_(out, [torch.zeros(3, 0)], [torch.zeros(3, 7)], [natural()], [0], [4])
    ops.jacobian_rows_(torch.zeros(0, 0), [torch.zeros(2, 0)], [torch.zeros(2, 0)], [torch.zeros(0, 2).long()], [0], [0])
    assert torch.equal(out, before)
    ops.jacobian_rows_(out, [torch.zeros(0, 2)], [torch.zeros(0, 2)], [torch.zeros(3, 1).long()], [0], [0])  # R = 0: all none
    assert torch.equal(out, torch.zeros(3, 4))


@pytest.mark.parametrize("function", [ops.jacobian_rows_, without_kernel])
def test_copy_on_write_and_version(function):
    original = torch.zeros(300, 1024)
    out = torch._lazy_clone(original)
    version = out._version
    function(out, [torch.ones(300, 32)], [torch.ones(300, 32)], [natural()], [0], [0])
    assert (original == 0).all()
    assert (out == 1).all()
    assert out._version > version


def test_opcheck():
    for dtype in (torch.float32, torch.float64):
        pieces = block(4, 3, 1, [None, 2, 1], dtype)
        opcheck(OPERATOR, (torch.zeros(5, 4, dtype=dtype), *pieces, [1] * 3, [1] * 3))


GOOD = {
    "out": torch.zeros(6, 20),
    "left": [torch.ones(5, 4), torch.ones(7, 4)],
    "right": [torch.ones(5, 3), torch.ones(7, 3)],
    "rows": [natural(), torch.zeros(5, 2).long()],
    "start": [1, 1],
    "offset": [8, 8],
}


@needs_kernels
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"left": []}, ValueError, "expected lists of one length, got 0 left, 2 right, 2 rows, 2 start, 2 offset"),
        ({"offset": [8]}, ValueError, "expected lists of one length, got 2 left, 2 right, 2 rows, 2 start, 1 offset"),
        ({"out": torch.zeros(6)}, ValueError, "expected out with 2 dimensions, got 1"),
        ({"out": torch.zeros(6, 20).half()}, TypeError, "expected out of dtype float32 or float64, got Half"),
        ({"out": torch.zeros(20, 6).T}, ValueError, "expected out with contiguous rows that do not overlap, got shape"),
        ({"out": torch.zeros(20).expand(6, 20)}, ValueError, r"that do not overlap, got shape \[6, 20\] and strides \[0, 1\]"),
        (
            {"left": [torch.ones(5, 4), torch.ones(7, 4).double()]},
            TypeError,
            "expected left of piece 1 of dtype Float as out, got Double",
        ),
        (
            {"right": [torch.ones(5, 3).double(), torch.ones(7, 3)]},
            TypeError,
            "expected right of piece 0 of dtype Float as out, got Double",
        ),
        ({"right": [none(), none()]}, TypeError, "expected right of piece 0 of dtype Float as out, got Double"),
        ({"left": [torch.ones(5), torch.ones(7, 4)]}, ValueError, "expected left of piece 0 with 2 dimensions, got 1"),
        ({"right": [torch.ones(5), torch.ones(7, 3)]}, ValueError, "expected right of piece 0 with 2 dimensions, got 1"),
        (
            {"right": [torch.ones(5, 3), torch.ones(6, 3)]},
            ValueError,
            r"expected right of piece 1 of shape \[7, 3\], got \[6, 3\]",
        ),
        (
            {"rows": [natural(), torch.zeros(5, 2).int()]},
            TypeError,
            "expected rows of piece 1 of dtype int64, got Int",
        ),
        ({"rows": [natural(), torch.zeros(5).long()]}, ValueError, "expected rows of piece 1 with 2 dimensions, got 1"),
        (
            {"rows": [natural(), torch.tensor([[0, 8]] * 5)]},
            ValueError,
            r"expected rows of piece 1 in \[0, 7\], got 8",
        ),
        ({"rows": [torch.tensor([[0], [-1]] * 2), torch.zeros(4, 2).long()]}, ValueError, r"rows of piece 0 in \[0, 5\], got -1"),
        ({"start": [2, 2]}, ValueError, "expected 5 rows of piece 0 within the 6 of out, got start 2"),
        ({"start": [1, -1]}, ValueError, "expected 5 rows of piece 1 within the 6 of out, got start -1"),
        ({"offset": [9, 9]}, ValueError, "expected 4 x 3 columns of piece 0 within the 20 of out, got offset 9"),
        ({"offset": [8, -1]}, ValueError, "expected 4 x 3 columns of piece 1 within the 20 of out, got offset -1"),
        (
            {"rows": [natural(), torch.zeros(4, 2).long()]},
            ValueError,
            "expected piece 1 of 5 rows and 4 x 3 columns as piece 0 at the same place, got 4 rows and 4 x 3 columns",
        ),
        (
            {"left": [torch.ones(5, 4), torch.ones(7, 3)], "right": [torch.ones(5, 3), torch.ones(7, 4)]},
            ValueError,
            "expected piece 1 of 5 rows and 4 x 3 columns as piece 0 at the same place, got 5 rows and 3 x 4 columns",
        ),
    ],
)
def test_bad_input(change, error, message):
    arguments = {**GOOD, **change}
    before = arguments["out"].clone()
    with pytest.raises(error, match="jacobian_rows_: .*" + message):
        ops.jacobian_rows_(**arguments)
    assert torch.equal(arguments["out"], before)


# What test_fuzz.py changes without making it wrong: the table of rows is of integers.
FUZZ_ACCEPTED = {"jacobian_rows_": {"integer"}}


def fuzz_cases(q):
    """Every operator with arguments made of the problem that test_fuzz.py draws."""
    x, y, g = q["d1"], q["d2"], q["b"]
    r, n = x.shape
    rows = torch.arange(6).view(3, 2) % (r + 1)
    out = x.new_ones(len(g) + 3, n * n + n + 1)
    left, right = [x, y, g], [y, x, none(x.dtype)]
    return [(OPERATOR, (out, left, right, [rows, rows.flip(1), natural()], [0, 0, 1], [0, 0, n * n]))]
