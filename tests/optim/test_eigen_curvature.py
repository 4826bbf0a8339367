"""EigenAdam with the bases of a bias Hessian: which ones, when they are recorded, and what the habits make of it."""

import copy
import gc
import math
import os
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers.curvatures import blocks
from helpers.eigen import batch, network, reloaded, train, values
from oracles import pch_by_loops
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import secondorder as so
from secondorder.curvature import CURVATURES, PCH, Curvature, curvature_by_name

RENEWED = [t < 5 or t % 5 == 0 for t in range(24)]  # which steps renew bases


def make(params, curvature="pch-abs", criterion=None, **options):
    criterion = criterion or nn.CrossEntropyLoss()
    return so.EigenAdam(params, curvature=curvature, criterion=criterion, **options)


def run(model, optimizer, seeds, **kwargs):
    """Training by the optimizer's own criterion; what a curvature draws depends on the batch alone."""
    losses = []
    for seed in seeds:
        torch.manual_seed(seed)
        losses += train(model, optimizer, [seed], loss=optimizer.criterion, **kwargs)
    return losses


def run_in_place(model, optimizer, steps, **kwargs):
    """Makes steps on one batch, each from where the first one began."""
    weights = copy.deepcopy(model.state_dict())
    for _ in range(steps):
        run(model, optimizer, [0], **kwargs)
        model.load_state_dict(weights)


def assert_eigenvectors(optimizer, layer, hessian, k):
    """The layer's U is made of the k leading eigenvectors of H, in their order."""
    eigenvalues, eigenvectors = torch.linalg.eigh(hessian)
    state = optimizer.state[layer.weight]
    torch.testing.assert_close(state["scale_out"][:k], eigenvalues.flip(0)[:k], rtol=2e-2, atol=0)
    overlap = (state["basis_out"][:k] * eigenvectors.T.flip(0)[:k]).sum(1).abs()
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-2)


# --- the bases ------------------------------------------------------------------------------------------------------------


def test_bases_are_the_eigenvectors_of_the_positive_curvature_hessian():
    """As loops over instances have it, once the weights stand still."""
    model = network()
    optimizer = make(model, rank=3, renew_every=1)
    run_in_place(model, optimizer, 160, m=6)
    x, y = batch(0, 6)
    layers = [model[i] for i in (0, 2, 4)]
    exact = pch_by_loops(
        [layer.weight.detach() for layer in layers], [layer.bias.detach() for layer in layers], [torch.tanh] * 2,
        lambda z, i: F.cross_entropy(z[None], y[i : i + 1]) / 6, x, -1.0,
    )  # fmt: skip
    for layer, hessian, k in zip(layers, exact, (2, 2, 2), strict=True):
        assert_eigenvectors(optimizer, layer, hessian, k)


@pytest.mark.parametrize("curvature", [*CURVATURES, PCH(0.0)], ids=str)
def test_bases_are_the_eigenvectors_of_every_bias_hessian(curvature):
    model = network()
    optimizer = make(model, curvature, rank=3, renew_every=1)
    run_in_place(model, optimizer, 100)
    torch.manual_seed(0)
    found = blocks(model, nn.CrossEntropyLoss(), curvature_by_name(curvature), batch())
    for i in (0, 2):
        assert_eigenvectors(optimizer, model[i], found[str(i)], 1)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_every_bias_hessian_trains(curvature):
    model = network()
    losses = run(model, make(model, curvature), [seed % 10 for seed in range(80)])
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_the_gradients_bases_are_the_default_and_lay_no_tape():
    models, criterion = [network(), network()], nn.CrossEntropyLoss()
    optimizers = [so.EigenAdam(models[0]), so.EigenAdam(models[1], curvature="gradient")]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(12), loss=criterion)
        assert optimizer._hessians is None
        assert optimizer.criterion is None
        assert [len(layer._forward_hooks) for layer in model] == [1, 0, 1, 0, 1]
        assert "curved" not in optimizer.state[model[0].weight]
    assert torch.equal(values(models[0]), values(models[1]))


def test_the_other_bases_and_the_first_step_are_those_without_it():
    """At one step's renewal from the same state U alone differs."""
    models = [network(), network()]
    optimizers = [so.EigenAdam(models[0]), make(models[1])]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, [0], loss=optimizer.criterion or nn.CrossEntropyLoss())
    states = [optimizer.state[model[0].weight] for model, optimizer in zip(models, optimizers, strict=True)]
    for key in ("basis_in", "scale_in", "mean"):
        assert torch.equal(states[0][key], states[1][key])
    assert not torch.equal(states[0]["basis_out"], states[1]["basis_out"])


def test_the_scale_of_the_loss_changes_nothing():
    models = [network(), network()]
    run(models[0], make(models[0]), range(30))
    run(models[1], make(models[1], criterion=lambda z, y: 1024 * F.cross_entropy(z, y)), range(30))
    torch.testing.assert_close(values(models[0]), values(models[1]), rtol=1e-5, atol=1e-7)


class _Tied(nn.Module):
    """Two linear layers with one weight, a convolution, an LSTM, and linear layers of their own."""

    def __init__(self):
        super().__init__()
        self.convolution, self.lstm = nn.Conv1d(1, 4, 6), nn.LSTM(20, 9, batch_first=True)
        self.first, self.second, self.hidden, self.head = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 30), nn.Linear(30, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        h = self.lstm(torch.tanh(self.convolution(x[:, None])))[0][:, -1]
        return self.head(torch.tanh(self.hidden(torch.tanh(self.second(torch.tanh(self.first(h)))))))


def test_what_no_curvature_covers_keeps_the_bases_of_its_gradient():
    torch.manual_seed(0)
    model = _Tied().double()
    optimizer = make(model)
    losses = run(model, optimizer, [seed % 4 for seed in range(60)])
    assert losses[-1] < 0.8 * losses[0]
    curved = {name for name, p in model.named_parameters() if optimizer.state.get(p, {}).get("curved")}
    assert curved == {"hidden.weight", "head.weight"}
    other = make(_Tied().double())
    other.load_state_dict(reloaded(optimizer.state_dict()))


class _Sometimes(Curvature):
    """The identity, NaN or nothing, as the test says."""

    def __init__(self):
        self.calls, self.value, self.covers = 0, 1.0, True

    def bias_hessians(self, records, averaged=None):
        self.calls += 1
        return {r.layer: self.value * torch.diag(torch.arange(r.layer.out_features, 0.0, -1).to(r.dtype)) for r in records}


def test_a_bias_hessian_is_asked_for_and_recorded_where_bases_are_renewed_alone():
    model, curvature = network(), _Sometimes()
    optimizer = make(model, curvature)
    for t, renewed in enumerate(RENEWED):
        before = curvature.calls
        x, y = batch(t)
        optimizer.zero_grad()
        optimizer.criterion(model(x), y).backward()
        assert bool(optimizer._hessians.tape.losses) == renewed
        optimizer.step()
        assert curvature.calls - before == renewed
        assert not optimizer._hessians.tape.losses


def test_a_bias_hessian_that_is_not_finite_leaves_the_bases():
    model, curvature = network(), _Sometimes()
    optimizer = make(model, curvature, renew_every=1)
    run(model, optimizer, range(8))
    before = optimizer.state[model[0].weight]["basis_out"].clone()
    curvature.value = math.nan
    run(model, optimizer, range(8, 12))
    torch.testing.assert_close(optimizer.state[model[0].weight]["basis_out"], before)
    assert optimizer.skipped_steps == 0


def test_a_run_that_changes_its_curvature_begins_its_averages_anew():
    """A gradient's second moments and a bias Hessian are on scales of their own."""
    model = network()
    optimizer = so.EigenAdam(model)
    train(model, optimizer, range(10))
    curvature = _Sometimes()
    curvature.value = 1e-9
    other = make(model, curvature)
    other.load_state_dict(reloaded(optimizer.state_dict()))
    assert optimizer.state[model[0].weight]["scale_out"].min() > 0
    run(model, other, [10])
    assert 0 < other.state[model[0].weight]["scale_out"].max() <= 40e-9
    assert other.state[model[0].weight]["curved"] is True
    other.remove_hooks()
    run(model, other, range(11, 16))
    assert other.state[model[0].weight]["scale_out"].max() > 1e-6
    assert other.state[model[0].weight]["curved"] is False


# --- habits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("at", [1, 5, 8, 16])
def test_a_resumed_run_is_the_same_to_the_bit(at, curvature):
    model = network()
    optimizer = make(model, curvature)
    run(model, optimizer, range(at))
    other = network()
    other.load_state_dict(reloaded(model.state_dict()))
    resumed = make(other, curvature)
    resumed.load_state_dict(reloaded(optimizer.state_dict()))
    run(model, optimizer, range(at, 24))
    run(other, resumed, range(at, 24))
    assert torch.equal(values(model), values(other))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_copies_of_model_and_optimizer_train_alike(how):
    model = network()
    optimizer = make(model)
    run(model, optimizer, range(6))
    other, copied = how((model, optimizer))
    run(model, optimizer, range(6, 14))
    run(other, copied, range(6, 14))
    assert torch.equal(values(model), values(other))


def test_maximizing_is_minimizing_the_negative():
    """Where the curvature of the negative is another one than that of the loss."""
    models = [network(), network()]
    run(models[0], make(models[0], "pch-clip-all"), range(12))
    negative = lambda z, y: -F.cross_entropy(z, y)  # noqa: E731
    run(models[1], make(models[1], "pch-clip-all", negative, maximize=True), range(12))
    torch.testing.assert_close(values(models[0]), values(models[1]), rtol=1e-6, atol=1e-9)


def test_accumulated_micro_batches_are_one_batch():
    models = [network(), network()]
    optimizers = [make(model) for model in models]
    for seed in range(8):
        x, y = batch(seed)
        for model, optimizer, parts in zip(models, optimizers, (1, 4), strict=True):
            optimizer.zero_grad()
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (optimizer.criterion(model(a), b) / parts).backward()
            optimizer.step()
    torch.testing.assert_close(values(models[0]), values(models[1]), rtol=1e-6, atol=1e-8)


def test_grad_scaler_changes_nothing_and_a_skipped_step_leaves_nothing_behind():
    models = [network(torch.float32), network(torch.float32)]
    optimizers = [make(model) for model in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed in range(12):
        x, y = batch(seed, dtype=torch.float32)
        if seed == 3:  # a step that the scaler skips
            optimizers[1].zero_grad()
            scaler.scale(optimizers[1].criterion(models[1](x), y)).backward()
            models[1][0].weight.grad[0, 0] = math.inf
            scaler.step(optimizers[1])
            scaler.update(1024.0)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = optimizer.criterion(model(x), y)
            if model is models[0]:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
    assert torch.equal(values(models[0]), values(models[1]))


def test_bfloat16_parameters():
    model = network(torch.bfloat16)
    losses = run(model, make(model), range(60), dtype=torch.bfloat16)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_hooks_go_with_the_optimizer_or_before():
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = make(model, criterion=criterion)
    run(model, optimizer, range(6))
    optimizer.remove_hooks()
    assert not any(
        module._forward_hooks or {"forward", "_compiled_call_impl"} & vars(module).keys()
        for module in [*model.modules(), criterion]
    )
    before = values(model)
    train(model, optimizer, range(6, 20))  # from gradients, by any loss
    assert not torch.equal(values(model), before)
    alive = weakref.ref(make(model, criterion=criterion))
    gc.collect()
    assert alive() is None
    assert not any(
        module._forward_hooks or {"forward", "_compiled_call_impl"} & vars(module).keys()
        for module in [*model.modules(), criterion]
    )


def test_lazy_layers_and_layers_that_are_unfrozen():
    model = nn.Sequential(nn.LazyLinear(40), nn.Tanh(), nn.Linear(40, 20), nn.Tanh(), nn.Linear(20, 3))
    model[2].requires_grad_(False)
    optimizer = make(model)
    model(torch.zeros(2, 25))
    losses = run(model, optimizer, range(6), dtype=torch.float32)
    assert optimizer.state[model[0].weight]["curved"]
    model[2].requires_grad_(True)
    optimizer.add_param_group({"params": model[2].parameters()})
    losses += run(model, optimizer, range(6, 60), dtype=torch.float32)
    assert optimizer.state[model[2].weight]["curved"]
    assert losses[-1] < losses[0]


def test_parameters_with_their_model_and_a_function_as_criterion():
    models = [network(), network()]
    run(models[0], make(models[0]), range(12))
    run(models[1], make(models[1].parameters(), criterion=F.cross_entropy, model=models[1]), range(12))
    assert torch.equal(values(models[0]), values(models[1]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"curvature": "pch-abs"}, ValueError, "EigenAdam: expected a criterion with curvature='pch-abs', got None"),
        ({"criterion": nn.MSELoss()}, ValueError, r"expected no criterion with curvature='gradient', .* got MSELoss\(\)"),
        ({"curvature": "pch"}, ValueError, "expected curvature to be one of 'gradient', .*'kflr'.*, or a Curvature, got 'pch'"),
        ({"curvature": None}, ValueError, "expected curvature to be one of 'gradient'.* got None"),
        ({"curvature": "kflr", "criterion": 3}, TypeError, "expected criterion to be an nn.Module or a function .* got int"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        so.EigenAdam(network(), **options)


def test_models_without_a_linear_layer_and_parameters_without_a_model_are_refused():
    with pytest.raises(ValueError, match="expected a model with curvature='pch-abs', got parameters alone; give model="):
        make(network().parameters())
    with pytest.raises(ValueError, match="expected a model with at least one trainable nn.Linear, got Conv1d with none"):
        make(nn.Conv1d(2, 3, 2))


def test_a_step_without_a_recorded_loss_is_an_error_and_changes_nothing():
    model = network()
    optimizer = make(model)
    run(model, optimizer, range(2))
    before, state = values(model), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.criterion(model(batch()[0]), batch()[1]).backward()
    optimizer.zero_grad()  # forgets that loss
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()  # not the criterion
    with pytest.raises(RuntimeError, match=r"EigenAdam.step\(\): there are gradients, but no call of the criterion"):
        optimizer.step()
    assert torch.equal(values(model), before)
    for i, entries in optimizer.state_dict()["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(state[i][key])) for key, v in entries.items())
    run(model, optimizer, [2])
    assert not torch.equal(values(model), before)


def test_a_layer_that_is_called_twice_trains():
    model = nn.Sequential(nn.Linear(25, 25), nn.Tanh(), nn.Linear(25, 3)).double()
    optimizer, losses = make(model), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = optimizer.criterion(model(torch.tanh(model[0](batch()[0]))), batch()[1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert optimizer.state[model[0].weight]["basis_out"].shape[0] > 0


def _rank(rank, ranks, path, results, rows):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    model = DistributedDataParallel(network())
    optimizer = make(model)
    for seed in range(12):
        x, y = batch(seed, sum(rows))
        optimizer.zero_grad()
        loss = optimizer.criterion(model(x.split(rows)[rank]), y.split(rows)[rank])
        (loss * rows[rank] * ranks / sum(rows)).backward()
        optimizer.step()
    results[rank] = values(model).tolist()
    dist.destroy_process_group()


def test_ranks_equal_one_process(tmp_path):
    rows = (5, 12, 9)
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (len(rows), os.fspath(tmp_path / "store"), results, rows), nprocs=len(rows))
        found = [torch.tensor(results[rank], dtype=torch.float64) for rank in range(len(rows))]
    model = network()
    run(model, make(model, rank=16), range(12), m=sum(rows))
    assert all(torch.equal(found[0], other) for other in found[1:])
    torch.testing.assert_close(found[0], values(model), rtol=1e-6, atol=1e-8)
