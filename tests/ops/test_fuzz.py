"""Arguments of every operator, drawn at random: the same numbers in any layout, a Python error for wrong ones, never a crash."""

import importlib
import itertools
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from helpers.kernels import needs_kernels
from hypothesis import given
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from secondorder import ops, reference
from secondorder.ops import _library

HERE = Path(__file__)
SIZES = st.sampled_from([0, 1, 1, 2, 3, 17, 33])
LAYOUTS = st.sampled_from(["contiguous", "transposed", "strided", "offset", "expanded"])
DTYPES = st.sampled_from([torch.float32, torch.float64])


def laid_out(t, layout):
    """The same values by other strides."""
    if layout == "transposed":
        return t.mT.contiguous().mT if t.dim() == 2 else t
    if layout == "strided":
        wide = t.new_full([2 * n for n in t.shape], float("nan"))
        view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
        return view.copy_(t)
    if layout == "offset":
        return torch.cat([t.new_full((3,), float("nan")), t.flatten()])[3:].view(t.shape)
    if layout == "expanded" and t.dim() == 2 and len(t):
        return t[:1].expand(t.shape)
    return t


@st.composite
def problems(draw):
    """The arguments of one layer, of awkward shapes and strides."""
    n_out, n_in, m, p = draw(SIZES), draw(SIZES), draw(SIZES), draw(st.sampled_from([1, 2, 5]))
    dtype, seed = draw(DTYPES), draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return laid_out(torch.randn(*shape, generator=generator, dtype=dtype), draw(LAYOUTS))

    root = torch.randn(n_out, n_out, generator=generator, dtype=dtype)
    h = root @ root.T / max(1, n_out) + 0.1 * torch.eye(n_out, dtype=dtype)
    h = laid_out((h + h.T) / 2, draw(st.sampled_from(["contiguous", "transposed", "strided", "offset"])))
    return {
        "h": h, "w": random(n_out, n_in), "d1": random(m, n_in), "d2": random(m, n_in), "grad": random(m, n_in),
        "a": random(n_in), "b": random(n_out, n_in), "g": random(n_out), "s": random(n_out), "y": random(n_out),
        "sp": torch.zeros(p, n_out, dtype=dtype), "yp": torch.zeros(p, n_out, dtype=dtype),
    }  # fmt: skip


MODULES = [importlib.import_module(path.stem) for path in sorted(HERE.parent.glob("test_*.py")) if path != HERE]
FAMILIES = [module for module in MODULES if hasattr(module, "fuzz_cases")]

ACCEPTED = {name: kinds for family in FAMILIES for name, kinds in getattr(family, "FUZZ_ACCEPTED", {}).items()}


def cases(q):
    """Every operator with its arguments, as the tests of each family of operators have them."""
    return [case for family in FAMILIES for case in family.fuzz_cases(q)]


def square_problem():
    """One small problem, of no awkward size."""
    generator = torch.Generator().manual_seed(0)
    h, w, d1, d2, grad, b = (torch.rand(3, 3, generator=generator) + torch.eye(3) for _ in range(6))
    a, g, s, y = (torch.rand(3, generator=generator) for _ in range(4))
    return {
        "h": h @ h.T, "w": w, "d1": d1, "d2": d2, "grad": grad, "a": a, "b": b, "g": g, "s": s, "y": y,
        "sp": torch.zeros(2, 3), "yp": torch.zeros(2, 3),
    }  # fmt: skip


OPERATORS = len(cases(square_problem()))


def leaves(value):
    return [t for v in value for t in leaves(v)] if isinstance(value, (list, tuple)) else [value]


def mapped(value, function):
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(v, function) for v in value)
    return function(value) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("index", range(OPERATORS))
@given(problem=problems())
def test_strides_do_not_matter_and_inputs_stay(index, problem):
    op, arguments = cases(problem)[index]
    plain = mapped(arguments, lambda t: t.contiguous().clone())
    written = {i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write}
    before = mapped(arguments, torch.clone)
    try:
        expected = op(*plain)
    except ValueError:
        with pytest.raises(ValueError, match="empty batch"):
            op(*arguments)
        return
    actual = op(*arguments)
    for a, b in zip(leaves(actual), leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, equal_nan=True)
    for i, (a, b) in enumerate(zip(arguments, before, strict=True)):
        if i not in written:
            assert all(
                not isinstance(x, torch.Tensor) or torch.equal(x.nan_to_num(), y.nan_to_num())
                for x, y in zip(leaves(a), leaves(b), strict=True)
            )


@needs_kernels
@pytest.mark.parametrize("index", range(OPERATORS))
@given(problem=problems(), data=st.data())
def test_a_wrong_argument_is_a_python_error(index, problem, data):
    op, arguments = cases(problem)[index]
    tensors = [i for i, a in enumerate(arguments) if isinstance(leaves(a)[0], torch.Tensor)]
    place = data.draw(st.sampled_from(tensors))
    wrongs = {
        "dtype": lambda t: t.to(torch.float64 if t.dtype == torch.float32 else torch.float32),
        "integer": lambda t: t.long(),
        "half": lambda t: t.half(),
        "dimension": lambda t: t.unsqueeze(0),
        "longer": lambda t: torch.cat([t, t.new_zeros(1, *t.shape[1:])]),
        "scalar": lambda t: t.new_zeros(()),
    }
    kind = data.draw(st.sampled_from(list(wrongs)))
    changed = list(mapped(arguments, torch.clone))
    changed[place] = mapped(changed[place], wrongs[kind])
    # A batch may be of any size.
    if kind != "longer" and kind not in ACCEPTED.get(op._schema.name.removeprefix("secondorder::"), ()):
        with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
            op(*changed)


@pytest.mark.parametrize("index", range(OPERATORS))
@given(problem=problems())
def test_fake_tensors_have_the_real_ones_shapes(index, problem):
    op, arguments = cases(problem)[index]
    try:
        real = op(*mapped(arguments, torch.clone))
    except ValueError:
        return
    with FakeTensorMode() as mode:
        fake = op(*mapped(arguments, lambda t: mode.from_tensor(t)))
    for a, b in zip(leaves(real), leaves(fake), strict=True):
        # None: it writes in place alone
        assert a is b is None or ((a.shape, a.dtype) == (b.shape, b.dtype) and a.is_contiguous() and b.is_contiguous())


def test_every_operator_is_among_the_cases():
    named = {schema.name + (f".{schema.overload_name}" if schema.overload_name else "")
             for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("secondorder::")}  # fmt: skip
    assert named == {op._schema.name + (f".{op._schema.overload_name}" if op._schema.overload_name else "")
                     for op, _ in cases(square_problem())}  # fmt: skip


@pytest.mark.parametrize("index", range(OPERATORS))
def test_opcheck(index):
    op, arguments = cases(square_problem())[index]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("index", range(OPERATORS))
def test_inside_a_compiled_function_without_graph_breaks(index, backend):
    op, arguments = cases(square_problem())[index]
    given = mapped(arguments, torch.clone)
    expected = op(*given)
    torch.compiler.reset()

    def function(*args):
        return mapped(op(*mapped(args, lambda t: t + 0)), lambda t: 2 * t)

    actual = torch.compile(function, fullgraph=True, backend=backend)(*arguments)
    for x, y in zip(leaves(actual), leaves(expected), strict=True):
        assert x is y is None or torch.equal(x, 2 * y)
    torch.compile(op, fullgraph=True, backend=backend)(*arguments)
    for x, y in zip(leaves(arguments), leaves(given), strict=True):  # what is written in place
        assert not isinstance(x, torch.Tensor) or torch.equal(x, y)


@pytest.mark.parametrize("index", range(OPERATORS))
def test_autocast_changes_nothing(index):
    op, arguments = cases(square_problem())[index]
    inside, outside = (mapped(arguments, torch.clone) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        actual = op(*inside)
    for x, y in zip([*leaves(actual), *leaves(inside)], [*leaves(op(*outside)), *leaves(outside)], strict=True):
        assert x is y is None or not isinstance(x, torch.Tensor) or (x.dtype == y.dtype and same(x, y))


@pytest.mark.parametrize("index", range(OPERATORS))
def test_a_meta_tensor_among_others_is_refused(index):
    op, arguments = cases(square_problem())[index]
    flat = [t for t in leaves(arguments) if isinstance(t, torch.Tensor)]
    for place in range(len(flat) if len(flat) > 1 else 0):
        with pytest.raises(ValueError, match="expected all tensors on one device, got cpu, meta"):
            op(*mapped(arguments, lambda t, chosen=flat[place]: t.to("meta") if t is chosen else t))


@given(problem=problems())
def test_aliased_arguments(problem):
    """One tensor in several places is read, not written."""
    w = problem["w"]
    if not len(w):
        return
    square = (w @ w.T).contiguous()
    before = square.clone()
    result = ops.bias_hessian(square, square, square, square, square, -1.0)
    torch.testing.assert_close(result, reference.bias_hessian(before, before, before, before, before, -1.0), rtol=1e-3, atol=1e-2)
    assert torch.equal(square, before)


def test_more_than_2_to_the_31_elements_by_strides():
    m, n = 2**16 + 1, 2**15
    d1 = torch.ones(1, 1).expand(m, n)  # 2^31 + 2^15 elements of one number
    result = ops.bias_hessian(torch.eye(1), torch.ones(1, n)[:, :3], d1[:, :3], None, None, 0.0)
    assert torch.equal(result, torch.ones(3, 3))
    wide = torch.zeros(1, 1).expand(2**16, 2**15 + 1)
    assert torch.equal(ops.eacg_hvp(torch.eye(2), torch.ones(5), wide[:: 2**15, :: 2**13]), torch.zeros(2, 5))


# --- a device without kernels -------------------------------------------------------------------------------------------------


ELSEWHERE = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)  # no kernel of the package is registered for it


@pytest.fixture
def elsewhere(monkeypatch):
    """Calls an operator as the dispatcher would on such a device; the tensors are on the CPU."""
    monkeypatch.setattr(_library, "_told", {"cpu"})
    return lambda op, arguments: op.redispatch(ELSEWHERE, *arguments)


def poisoned(arguments, number):
    """One number in every tensor that holds floating-point ones."""

    def poison(t):
        t = t.clone()
        if t.is_floating_point() and t.numel() and number is not None:
            t.view(-1)[-1] = number
        return t

    return mapped(arguments, poison)


@needs_kernels
@pytest.mark.parametrize("number", [None, float("nan"), 1e30])
@pytest.mark.parametrize("index", range(OPERATORS))
def test_plain_pytorch_returns_and_writes_what_the_kernels_do(index, number, elsewhere):
    op, arguments = cases(square_problem())[index]
    if number is None:  # conjugate gradients that go on after they have converged differ by far more than a rounding
        arguments = mapped(arguments, lambda t: t.double() if t.is_floating_point() else t)
    before = poisoned(arguments, number)
    ours, theirs = (mapped(before, torch.clone) for _ in range(2))
    expected, actual = op(*ours), elsewhere(op, theirs)
    for a, b, start in zip(leaves(theirs), leaves(ours), leaves(before), strict=True):
        if isinstance(
            a, torch.Tensor
        ):  # what a step that fails leaves alone; sums in float64 fail later than those of plain PyTorch
            assert same(a, start) or not same(b, start)
    if number is None:
        for a, b in zip([*leaves(actual), *leaves(theirs)], [*leaves(expected), *leaves(ours)], strict=True):
            assert a is b is None or not isinstance(a, torch.Tensor) or a.dtype == b.dtype
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def recorded(t):
    """Whether autograd has recorded what made a tensor, beyond that its operator is not differentiable."""
    return isinstance(t, torch.Tensor) and t.grad_fn is not None and "NotImplemented" not in t.grad_fn.name()


@pytest.mark.parametrize("index", range(OPERATORS))
def test_autograd_records_nothing_and_leaves_may_be_written(index, elsewhere):
    op, arguments = cases(square_problem())[index]
    for function in (op, lambda *given: elsewhere(op, given)):
        # Products of this size are torch's own, on the CPU, too.
        trained = mapped(arguments, lambda t: t.clone().requires_grad_() if t.is_floating_point() else t.clone())
        result = function(*trained)
        assert not any(recorded(t) for t in [*leaves(result), *leaves(trained)])


NOT_DIFFERENTIABLE = (
    "expected tensors without tangents, got some of forward-mode AD; no operator of secondorder is differentiable"
)


def written_at(op):
    """The positions of the arguments that an operator writes."""
    return [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]


def floating(arguments):
    return [t for t in leaves(arguments) if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel()]


def public(op):
    """The function of `secondorder.ops` that calls an operator."""
    name = f"{op._schema.name}.{op._schema.overload_name}".removeprefix("secondorder::").removesuffix(".").removesuffix(".list")
    return getattr(ops, name.replace(".", "_"))


@pytest.mark.parametrize("index", range(OPERATORS))
def test_tangents_are_refused(index):
    """Of any argument, whether gradients are computed or not: results without tangents would count as constants."""
    op, arguments = cases(square_problem())[index]
    function = public(op)
    for chosen in floating(arguments):

        def called(t, chosen=chosen):
            return function(*mapped(arguments, lambda each: t if each is chosen else each.clone()))

        for grad in (True, False):
            with torch.set_grad_enabled(grad), forward_ad.dual_level():
                dual = forward_ad.make_dual(chosen.clone(), torch.ones_like(chosen))
                with pytest.raises(NotImplementedError, match=NOT_DIFFERENTIABLE):
                    called(dual)
            assert torch.equal(dual, chosen)
            with torch.set_grad_enabled(grad), pytest.raises(NotImplementedError, match=NOT_DIFFERENTIABLE):
                torch.func.jvp(called, (chosen,), (torch.ones_like(chosen),))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("index", range(OPERATORS))
def test_vmap_is_a_loop_or_refused(index):
    op, arguments = cases(square_problem())[index]
    for chosen in floating(arguments):

        def called(t, chosen=chosen):
            own = mapped(arguments, lambda each: t if each is chosen else each.clone())
            return [r for r in leaves([op(*own)]) if r is not None]

        batch = torch.stack([chosen, 2 * chosen])
        kept = batch.clone()
        try:
            batched = torch.func.vmap(called)(batch)
        except RuntimeError as error:
            assert "Batching rule not implemented" in str(error) or "vmap" in str(error)  # noqa: PT017
            assert torch.equal(batch, kept)
        else:
            for i, t in enumerate(kept):
                for a, b in zip(batched, called(t.clone()), strict=True):
                    torch.testing.assert_close(a[i], b)


@needs_kernels
@pytest.mark.parametrize("index", range(OPERATORS))
def test_a_tensor_that_would_be_written_twice_is_refused(index):
    op, arguments = cases(square_problem())[index]
    places = written_at(op)

    def doubled():
        """The arguments of two such layers, each with tensors of its own."""
        first, second = (mapped(arguments, torch.clone) for _ in range(2))
        return [a + b if isinstance(a, list) else a for a, b in zip(first, second, strict=True)]

    if any(isinstance(arguments[place], list) for place in places):
        op(*doubled())
    twice = [(p, 0, p, len(arguments[p])) for p in places if isinstance(arguments[p], list) and floating(arguments[p])]
    twice += [(p, 0, q, 0) for p, q in itertools.combinations(places, 2) if alike(arguments[p], arguments[q])]
    for p, i, q, j in twice:
        given = doubled()
        given[q][j] = given[p][i]
        before = mapped(given, torch.clone)
        name = op._schema.name.removeprefix("secondorder::")
        with pytest.raises(
            ValueError, match=rf"{name}: expected an? \w+ in memory of its own, got one that is written elsewhere"
        ):
            op(*given)
        for a, b in zip(leaves(given), leaves(before), strict=True):
            assert not isinstance(a, torch.Tensor) or same(a, b)


def alike(a, b):
    """Whether two written arguments are lists of tensors of one kind."""
    if not (isinstance(a, list) and isinstance(b, list) and floating(a) and floating(b)):
        return False
    return a[0].shape == b[0].shape and a[0].dtype == b[0].dtype


def test_autograd_records_nothing_of_large_arguments():
    h, logits = torch.rand(1 << 8, 1 << 8, requires_grad=True), torch.rand(1 << 7, 1 << 6, requires_grad=True)
    target = torch.zeros(1 << 7, dtype=torch.int64)
    for t in (*ops.mean_inputs([h]), ops.cross_entropy_hessian(logits, target, -100, True), ops.precondition(h, h, h)):
        assert not recorded(t)


@pytest.mark.parametrize("index", range(OPERATORS))
def test_what_is_written_counts_it(index):
    """So that autograd refuses a backward pass that would need the values before."""
    op, arguments = cases(square_problem())[index]
    given = mapped(arguments, torch.clone)
    versions = [t._version if isinstance(t, torch.Tensor) else 0 for t in leaves(given)]
    op(*given)
    for t, before, version in zip(leaves(given), leaves(arguments), versions, strict=True):
        assert not isinstance(t, torch.Tensor) or same(t, before) or t._version > version


@needs_kernels
@pytest.mark.parametrize("index", range(OPERATORS))
def test_inference_tensors_are_written_in_inference_mode_alone(index):
    """Elsewhere ATen refuses to count the write, which must not have been made then. What is read may be one anywhere."""
    op, arguments = cases(square_problem())[index]
    with torch.inference_mode():
        locked = mapped(arguments, torch.clone)
        op(*mapped(arguments, torch.clone))
    fresh = mapped(arguments, torch.clone)
    writes = [argument.alias_info is not None and argument.alias_info.is_write for argument in op._schema.arguments]
    op(*(f if written else r for f, r, written in zip(fresh, locked, writes[: len(fresh)], strict=True)))
    for place, tensors in enumerate(arguments):
        for chosen in leaves((tensors,)) if writes[place] else []:
            given = mapped(arguments, torch.clone)
            taken = mapped((tensors,), lambda t, chosen=chosen: locked_copy(t) if t is chosen else t.clone())
            given = (*given[:place], *taken, *given[place + 1 :])
            with pytest.raises(RuntimeError, match="that may be written, got an inference tensor outside of"):
                op(*given)
            for a, b in zip(leaves(given), leaves(arguments), strict=True):
                assert not isinstance(a, torch.Tensor) or same(a, b)


def locked_copy(t):
    with torch.inference_mode():
        return t.clone()


@pytest.mark.parametrize("index", range(OPERATORS))
def test_plain_pytorch_returns_contiguous_tensors_as_the_fake_ones_are(index, elsewhere):
    op, arguments = cases(square_problem())[index]
    strided = [
        argument if schema.alias_info is not None else mapped(argument, lambda t: laid_out(t, "transposed"))
        for schema, argument in zip(op._schema.arguments, arguments)  # the last ones have defaults
    ]
    assert all(t is None or t.is_contiguous() for t in leaves(elsewhere(op, strided)))


def same(a, b):
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def test_a_device_without_kernels_is_warned_of_once(monkeypatch):
    if _library.compiled is None:
        pytest.skip("there are no kernels for any device")
    monkeypatch.setattr(_library, "_told", set())
    arguments = torch.eye(2), torch.ones(3), torch.ones(2, 3), None, 0.1, 5, 0.0, False
    with pytest.warns(UserWarning, match="no kernels for tensors on cpu here; plain PyTorch stands in"):
        torch.ops.secondorder.eacg_solve.default.redispatch(ELSEWHERE, *arguments)
    torch.ops.secondorder.eacg_solve.default.redispatch(ELSEWHERE, *arguments)
