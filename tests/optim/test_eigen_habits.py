"""EigenAdam and the habits of torch's own optimizers."""

import copy
import gc
import math
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers.eigen import batch, network, train, values
from torch import nn

import secondorder as so


@pytest.mark.parametrize("optimizer", [so.EigenAdam, so.LevenbergMarquardt])
def test_modules_in_place_of_parameters_are_told_what_to_write(optimizer):
    first, second = network(), network()
    for given in ([first, second], [{"params": first[0]}], [{"params": [*first.parameters(), second]}]):
        with pytest.raises(TypeError, match=r"got a module; write model.parameters\(\) in a group, .* nn.ModuleList"):
            optimizer(given)
    both = optimizer([{"params": nn.ParameterList(first.parameters())}])
    for given in (second, second[0]):
        with pytest.raises(TypeError, match="got a module"):
            both.add_param_group({"params": given})
    assert len(both.param_groups) == 1
    both.add_param_group({"params": second.parameters()})
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        optimizer([first[0].weight, "bias"])


def test_a_vector_that_is_not_finite_keeps_all_bases():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(25, 40), nn.LayerNorm(40), nn.Linear(40, 3)).double()
    optimizer = so.EigenAdam(model)
    train(model, optimizer, range(5))
    x, y = batch(5)
    F.cross_entropy(model(x), y).backward()  # the step that comes next renews bases
    model[1].weight.grad[0] = math.nan
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(so.NonFiniteError):
        optimizer.step()
    for i, state in optimizer.state_dict()["state"].items():
        kept = {name: value for name, value in state.items() if name not in ("control", "refused")}
        torch.testing.assert_close(kept, {name: before[i][name] for name in kept}, rtol=0, atol=0)


def test_hooks_go_with_the_optimizer():
    model = network()
    optimizer = so.EigenAdam(model)
    assert all(layer._forward_hooks for layer in model if isinstance(layer, nn.Linear))
    optimizer.remove_hooks()
    assert not any(module._forward_hooks for module in model.modules())
    alive = weakref.ref(so.EigenAdam(model))
    gc.collect()
    assert alive() is None
    assert not any(module._forward_hooks for module in model.modules())


def test_frozen_and_unfrozen_layers():
    model = network()
    model[0].requires_grad_(False)
    optimizer = so.EigenAdam(model)
    before = model[0].weight.clone()
    train(model, optimizer, range(4))
    assert torch.equal(model[0].weight, before)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.5})
    found = optimizer.metrics()
    train(model, optimizer, range(4))
    assert not torch.equal(model[0].weight, before)
    assert len(optimizer.param_groups) == 2
    assert found["slope"] != 0  # which was found before the first parameter changed its group
    assert optimizer._shared_state()["steps"] == 8
    model[2].weight.requires_grad_(False)  # but not its bias
    kept = model[2].weight.clone(), model[2].bias.clone()
    train(model, optimizer, range(3))
    assert torch.equal(model[2].weight, kept[0])
    assert not torch.equal(model[2].bias, kept[1])


def test_layers_are_skipped_now_and_then():
    model = network()
    optimizer = so.EigenAdam(model)
    for seed in range(12):
        x, y = batch(seed)
        optimizer.zero_grad()
        skipped = seed % 3 == 0
        z = model[:2] + nn.Sequential(nn.Linear(40, 3).double()) if skipped else model
        before = values(model[2:])
        F.cross_entropy(z(x), y).backward()
        optimizer.step()
        assert torch.equal(values(model[2:]), before) == skipped
    assert [optimizer.state[model[i].weight]["step"] for i in (0, 2, 4)] == [12, 8, 8]


def test_maximizing_is_minimizing_the_negative():
    models = [network(), network()]
    train(models[0], so.EigenAdam(models[0]), range(12))
    train(models[1], so.EigenAdam(models[1], maximize=True), range(12), loss=lambda z, y: -F.cross_entropy(z, y))
    assert torch.equal(values(models[0]), values(models[1]))


def test_accumulated_micro_batches_are_one_batch():
    models = [network(), network()]
    optimizers = [so.EigenAdam(model) for model in models]
    for seed in range(8):
        x, y = batch(seed)
        for model, optimizer, parts in zip(models, optimizers, (1, 4), strict=True):
            optimizer.zero_grad()
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (F.cross_entropy(model(a), b) / parts).backward()
            optimizer.step()
    torch.testing.assert_close(values(models[0]), values(models[1]), rtol=1e-6, atol=1e-8)


def test_autocast_and_grad_scaler():
    models = [network(torch.float32), network(torch.float32)]
    optimizers = [so.EigenAdam(model) for model in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed in range(10):  # so that the next step renews bases
        x, y = batch(seed, dtype=torch.float32)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if model is models[1]:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
    assert torch.equal(values(models[0]), values(models[1]))
    optimizers[1].zero_grad()
    scaler.scale(F.cross_entropy(models[1](x), y)).backward()
    models[1][0].weight.grad[0, 0] = math.inf
    scaler.step(optimizers[1])
    scaler.update()
    assert torch.equal(values(models[0]), values(models[1]))
    for poisoned in (True, False):  # the step that the scaler skips leaves nothing behind
        optimizers[1].zero_grad()
        data = x.clone()
        data[0, 0] = math.inf if poisoned else 0.0
        scaler.scale(F.cross_entropy(models[1](data), y)).backward()
        scaler.step(optimizers[1])
        scaler.update()
    assert torch.isfinite(values(models[1])).all()
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(models[0], optimizers[0], range(20), dtype=torch.float32)
    assert all(map(math.isfinite, losses))


def test_clipping_and_closures_and_step_hooks():
    model, seen = network(), []
    optimizer = so.EigenAdam(model)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    x, y = batch()

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(30)]
    assert losses[-1] < losses[0]
    assert seen == ["before", "after"] * 30


def test_compiled_model_trains():
    model = network(torch.float32)
    compiled = torch.compile(model, backend="eager")
    optimizer = so.EigenAdam(compiled)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = train(compiled, optimizer, range(60), dtype=torch.float32)
    assert losses[-1] < losses[0]


def test_metrics_are_floats():
    model = network()
    optimizer = so.EigenAdam(model)
    train(model, optimizer, range(20))
    metrics = optimizer.metrics()
    assert all(isinstance(value, float) for value in metrics.values())
    assert 1e-6 <= metrics["length"] <= 0.1
    assert metrics["skipped_steps"] == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "expected lr >= 0, got -1.0"),
        ({"lr": "fast"}, TypeError, "expected lr to be a number"),
        ({"betas": (1.0, 0.95)}, ValueError, "expected betas to be two numbers"),
        ({"rank": 0}, ValueError, "expected rank to be an int >= 1"),
        ({"renew_every": 0}, ValueError, "expected renew_every to be an int >= 1"),
        ({"nonfinite": "ignore"}, ValueError, "expected nonfinite 'error' or 'skip', got 'ignore'"),
        ({"weight_decay": -0.1}, ValueError, "expected weight_decay >= 0"),
        ({"model": nn.Linear(2, 2)}, ValueError, "expected model to be given once"),
        ({"fused": True}, TypeError, "unexpected keyword"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        so.EigenAdam(network(), **options)


@pytest.mark.parametrize("value", [lambda loss: (loss, {}), lambda loss: None, lambda loss: torch.stack([loss, loss])])
def test_closures_may_give_anything(value):
    model = network()
    optimizer = so.EigenAdam(model)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch()[0]), batch()[1])
        loss.backward()
        return value(loss)

    optimizer.step(closure)


def test_bad_parameters_and_gradients():
    model = network()
    with pytest.raises(RuntimeError, match="expected gradients, found none"):
        so.EigenAdam(model).step()
    with pytest.raises(TypeError, match=r"expected model to be an nn.Module, got list; several models go into an nn.ModuleList"):
        so.EigenAdam(model.parameters(), model=[model])
    mixed = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3).double()])
    (mixed[0](torch.ones(3)).sum() + mixed[1](torch.ones(3).double()).sum()).backward()
    with pytest.raises(RuntimeError, match="expected all parameters of one dtype"):
        so.EigenAdam(mixed).step()
    wide = nn.Parameter(torch.ones(1, 3).expand(4, 3))
    wide.grad = torch.ones(4, 3)
    with pytest.raises(RuntimeError, match="expected parameters with memory of their own"):
        so.EigenAdam([wide]).step()
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="got a sparse one for 'weight'; use sparse=False"):
        so.EigenAdam(table).step()


@pytest.mark.parametrize("given", [nn.CrossEntropyLoss(), F.cross_entropy, nn.Linear(2, 2)])
def test_a_criterion_or_a_model_in_the_place_of_lr(given):
    with pytest.raises(TypeError, match="expected lr to be a number, got .*; EigenAdam.model. needs no criterion, and takes"):
        so.EigenAdam(nn.Linear(2, 2).parameters(), given)


@pytest.mark.parametrize("layout", ["plain", "transposed", "conjugate"])
@pytest.mark.parametrize("shape", [(6, 5), (7, 3, 2), (9,), (4, 1), ()])
def test_complex_parameters_are_pairs_of_numbers(shape, layout):
    """The steps are those of real parameters [..., 2]; of a vector where there is but a single row or column."""
    torch.manual_seed(0)
    start, matrix = torch.randn(shape, dtype=torch.complex64), torch.randn(math.prod(shape), 12, dtype=torch.complex64)
    if layout == "transposed" and len(shape) > 1:
        start = start.transpose(0, 1).contiguous().transpose(0, 1)
    real = torch.view_as_real(start.clone()).contiguous()
    pairs = nn.Parameter(start.clone())
    numbers = nn.Parameter(real if len(shape) > 1 and shape[1] > 1 else real.flatten())
    one, other = so.EigenAdam([pairs], weight_decay=0.1), so.EigenAdam([numbers], weight_decay=0.1)

    def step(p, optimizer, values):
        optimizer.zero_grad()
        ((values.reshape(-1) @ matrix - 1).abs() ** 2).sum().backward()
        if layout == "conjugate" and p.is_complex():
            p.grad = p.grad.conj().resolve_conj().conj()
        optimizer.step()

    for t in range(12):
        if t == 7:
            state = one.state_dict()
            one = so.EigenAdam([pairs], weight_decay=0.1)
            one.load_state_dict(state)
        step(pairs, one, pairs)
        step(numbers, other, torch.view_as_complex(numbers.view_as(real)))
    torch.testing.assert_close(torch.view_as_real(pairs), numbers.view_as(real), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(pairs, start)


def test_a_net_with_complex_weights_trains():
    """Fourier neural operators: a layer's inputs are complex, too, and show nothing."""

    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.modes = nn.Parameter(0.1 * torch.randn(4, 4, 5, dtype=torch.complex64))
            self.mix, self.head = nn.Linear(9, 9, dtype=torch.complex64), nn.Linear(4, 1)

        def forward(self, x):  # [B, 4, 16]
            spectrum = self.mix(torch.fft.rfft(x))
            low = torch.einsum("bim,iom->bom", spectrum[..., :5], self.modes)
            return self.head(torch.fft.irfft(low, n=16).transpose(1, 2)).squeeze(2)

    torch.manual_seed(0)
    model, x = Spectral(), torch.randn(64, 4, 16)
    y = x.sum(1).roll(3, 1)
    optimizer, losses = so.EigenAdam(model), []
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert optimizer.metrics()["coverage"] > 0.9


def test_frozen_integers_are_left_alone():
    """As weights of quantized layers below an adapter, also where one is the first parameter, and in a layer's place."""

    class Quantized(nn.Linear):
        def __init__(self):
            super().__init__(25, 25, bias=False)
            self.weight = nn.Parameter(torch.randint(-5, 5, (25, 25), dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return F.linear(x, 0.1 * self.weight.to(x.dtype))

    model = nn.Sequential(Quantized(), network())
    optimizer = so.EigenAdam(model)
    train(model, optimizer, range(3))
    other = copy.deepcopy(model)
    resumed = so.EigenAdam(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 8):
        train(model, optimizer, [seed])
        train(other, resumed, [seed])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert torch.equal(values(model[1]), values(other[1]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("made", [torch.jit.script, lambda model: torch.jit.trace(model, batch()[0])], ids=["script", "trace"])
def test_scripted_models_train_from_their_gradients(made):
    plain = network()
    model = made(copy.deepcopy(plain))
    train(plain, so.EigenAdam(plain.parameters()), range(8))
    train(model, so.EigenAdam(model), range(8))
    torch.testing.assert_close(values(model), values(plain), rtol=1e-4, atol=1e-5)


def test_a_compiled_step_is_the_plain_one():
    model, other = network(), network()
    optimizer, compiled = so.EigenAdam(model), so.EigenAdam(other)
    step = torch.compile(lambda: compiled.step(), backend="eager")
    for seed in range(7):
        train(model, optimizer, [seed])
        compiled.zero_grad()
        F.cross_entropy(other(batch(seed)[0]), batch(seed)[1]).backward()
        step()
    assert torch.equal(values(model), values(other))


def test_a_batch_without_gradients_is_told_of_once_and_changes_nothing():
    model = network()
    optimizer = so.EigenAdam(model)
    train(model, optimizer, range(3))
    before, state = values(model), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="expected gradients, found none, and left all parameters as they are"):
        optimizer.step()
    optimizer.step()
    assert torch.equal(values(model), before)
    after = optimizer.state_dict()["state"]
    assert all(
        torch.equal(value, after[i][key]) if isinstance(value, torch.Tensor) else value == after[i][key]
        for i, each in state["state"].items()
        for key, value in each.items()
    )
    train(model, optimizer, [3])
    assert not torch.equal(values(model), before)


def test_another_model_is_told_of():
    with pytest.warns(UserWarning, match="no parameter is one of model's"):
        so.EigenAdam(network().parameters(), model=network())
