"""accelerate: a prepared loop is the plain one, with accumulation, clipping, mixed precision and saved states."""

import pytest
import torch
from helpers.frameworks import (
    CLOSED,
    STEPPED,
    assert_one_process,
    criterion_for,
    imported,
    in_two_processes,
    loader,
    network,
    of_few_directions,
    plain_loop,
    quiet,
    values,
)  # fmt: skip
from torch import nn

accelerate = imported("accelerate")
pytestmark = quiet


@pytest.fixture(autouse=True)
def _states():
    """One Accelerator's settings hold for a process; each test has its own."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def prepared(name, size=32, dtype=torch.float32, scheduled=None, **options):
    accelerator = accelerate.Accelerator(cpu=True, **options)
    net, criterion = network(dtype), criterion_for(name)
    optimizer = {**STEPPED, **CLOSED}[name](net, criterion)
    parts = [net, optimizer, loader(size, dtype)] + ([scheduled(optimizer)] if scheduled else [])
    return accelerator, criterion, *accelerator.prepare(*parts)


def fit(accelerator, criterion, net, optimizer, batches, scheduler=None, epochs=2, clip=None):
    for _ in range(epochs):
        for x, y in batches:
            with accelerator.accumulate(net):
                loss = criterion(net(x), y)
                accelerator.backward(loss)
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("name", STEPPED)
def test_a_prepared_loop_is_the_plain_one(name):
    def scheduled(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)

    parts = prepared(name, scheduled=scheduled)
    fit(*parts)
    assert torch.equal(values(parts[2]), values(plain_loop(name, scheduled=scheduled)))


@pytest.mark.parametrize("name", CLOSED)
def test_closures_go_through(name):
    accelerator, criterion, net, optimizer, batches = prepared(name)
    for _ in range(2):
        for x, y in batches:

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = criterion(net(x), y)
                accelerator.backward(loss)
                return loss

            optimizer.step(closure)
    assert torch.equal(values(net), values(plain_loop(name)))


@pytest.mark.parametrize("name", STEPPED)
def test_accumulated_batches_are_their_union(name):
    parts = prepared(name, 16, torch.float64, gradient_accumulation_steps=2)
    fit(*parts)
    torch.testing.assert_close(values(parts[2]), values(plain_loop(name, dtype=torch.float64)), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", STEPPED)
def test_gradients_are_clipped(name):
    parts = prepared(name)
    fit(*parts, clip=0.1)
    clipped = plain_loop(name, between=lambda net: nn.utils.clip_grad_norm_(net.parameters(), 0.1))
    torch.testing.assert_close(values(parts[2]), values(clipped))


@pytest.mark.parametrize("name", STEPPED)
def test_mixed_precision_is_autocast(name):
    parts = prepared(name, mixed_precision="bf16")
    fit(*parts, epochs=1)
    # The model's output is float32 here, where autocast leaves it in bfloat16.
    torch.testing.assert_close(values(parts[2]), values(plain_loop(name, 1, autocast=True)), rtol=0.1, atol=0.02)
    assert not torch.equal(values(parts[2]), values(plain_loop(name, 1)))


@pytest.mark.parametrize("name", STEPPED)
def test_a_run_from_a_saved_state_is_the_uninterrupted_one(name, tmp_path):
    first = prepared(name)
    fit(*first, epochs=1)
    first[0].save_state(tmp_path)
    fit(*first, epochs=2)
    second = prepared(name)
    second[0].load_state(tmp_path)
    fit(*second, epochs=2)
    assert torch.equal(values(second[2]), values(first[2]))


@pytest.mark.parametrize("name", STEPPED)
def test_accumulation_clipping_schedule_and_mixed_precision_resume_together(name, tmp_path):
    def parts():
        return prepared(
            name, 16, scheduled=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
            mixed_precision="bf16", gradient_accumulation_steps=2,
        )  # fmt: skip

    first = parts()
    fit(*first, epochs=1, clip=1.0)
    first[0].save_state(tmp_path)
    fit(*first, epochs=2, clip=1.0)
    second = parts()
    second[0].load_state(tmp_path)
    fit(*second, epochs=2, clip=1.0)
    assert torch.equal(values(second[2]), values(first[2]))


def trained_as_a_rank():
    """Parameters of two epochs, by the optimizer's name; accelerate shares the batches out."""
    accelerator, found = accelerate.Accelerator(cpu=True), {}
    for name in ("EigenAdam", "EACG", "LayerwiseNewton"):
        criterion = criterion_for(name)
        net = accelerator.prepare(network(torch.float64))
        optimizer, batches = accelerator.prepare(of_few_directions(name, net, criterion), loader(16, torch.float64))
        fit(accelerator, criterion, net, optimizer, batches)
        found[name] = values(net)
    return found


def test_several_processes_are_one_with_all_batches(tmp_path):
    assert_one_process(in_two_processes(trained_as_a_rank, tmp_path))
