"""What every optimizer saves, and that a state of another optimizer or another net is refused before anything changes."""

import copy
import io

import pytest
import torch
from helpers.kinds import NAMES, made, trained
from helpers.training import assert_same, snapshot

import secondorder as so

WIDER = (5, 9, 4, 3)


def reloaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_is_numbers_and_tensors_alone_and_goes_on_to_the_bit(name):
    model, optimizer, step = made(name)
    step()
    step()
    other, theirs, their_step = made(name)
    other.load_state_dict(reloaded(model.state_dict()))
    theirs.load_state_dict(reloaded(optimizer.state_dict()))
    random = torch.get_rng_state()
    step()
    torch.set_rng_state(random)
    their_step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def adam(**options):
    """The state of torch's Adam for a net of the same widths, after a step."""
    model, _, _ = made("EigenAdam", **options)
    optimizer = torch.optim.Adam(model.parameters())
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    return optimizer.state_dict()


def kind(name):
    """One of these goes on where another was: their factors mean the same, and their solver is the same."""
    return "KFAC" if name in ("KFLR", "KFRA") else name


@pytest.mark.parametrize("theirs", ["Adam", *NAMES])
@pytest.mark.parametrize("name", NAMES)
def test_the_state_of_another_optimizer_is_refused_and_nothing_changes(name, theirs):
    if kind(name) == kind(theirs):
        return
    model, optimizer, step = made(name)
    step()
    if theirs == "Adam":
        foreign = adam()
    else:
        _, other, other_step = made(theirs)
        other_step()
        foreign = other.state_dict()
    before, given = snapshot(model, optimizer), copy.deepcopy(foreign)
    with pytest.raises(ValueError, match=rf"{name}\.load_state_dict\(\): expected "):
        optimizer.load_state_dict(foreign)
    assert_same(snapshot(model, optimizer), before)
    assert_same(foreign, given)
    step()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "LevenbergMarquardt"])  # its state has no shape of the net's
def test_the_state_of_another_net_is_refused_and_nothing_changes(name):
    model, optimizer, step = made(name)
    step()
    _, wider, wider_step = made(name, widths=WIDER)
    wider_step()
    _, longer, longer_step = made(name, widths=(5, 7, 4, 3, 3))
    longer_step()
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=rf"{name}\.load_state_dict\(\): expected .* of shape \[7, .*\].* got .*\[9, "):
        optimizer.load_state_dict(wider.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(longer.state_dict())
    assert_same(snapshot(model, optimizer), before)
    step()


# --- the same numbers from run to run ---------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_number_of_threads_gives_the_same_bits(name, threads):
    """Others differ by rounding: LAPACK's factorisations, and long products, depend on how they are shared out."""
    threads(2)
    one, two = (trained(name, widths=(120, 110, 5), m=130, steps=2) for _ in range(2))
    assert torch.equal(one, two)
    threads(1)
    torch.testing.assert_close(trained(name, widths=(120, 110, 5), m=130, steps=2), one, rtol=1e-6, atol=1e-8)


@pytest.mark.skipif(not so.build_info()["extension"], reason="torch's own loops depend on the number of threads")
@pytest.mark.parametrize("name", ["EACG", "EigenAdam"])
def test_every_number_of_threads_gives_the_same_bits(name, threads):
    """Where torch's own products do: nothing else here depends on it."""
    widths, m = (300, 290, 5), 310  # wide enough for the kernels to share work out
    results, products = [], []
    for count in (1, 2, 3):
        threads(count)
        results.append(trained(name, widths=widths, m=m, steps=3))
        x, w, y = (
            torch.linspace(-1, 1, n * k, dtype=torch.float64).sin().view(n, k) for n, k in ((m, 300), (290, 300), (m, 290))
        )
        products.append(torch.cat([(x @ w.T).flatten(), (y.T @ x).flatten(), (y @ w).flatten()]))
    if not all(torch.equal(each, products[0]) for each in products):
        pytest.skip("torch's own products depend on the number of threads here")
    assert all(torch.equal(each, results[0]) for each in results)


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_algorithms(name):
    """None of torch's operators that it forbids is called, and no memory is read that nobody has written: it is NaN then."""
    expected = trained(name)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.equal(trained(name), expected)
    finally:
        torch.use_deterministic_algorithms(False)
