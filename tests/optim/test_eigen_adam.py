"""EigenAdam on models as people write them: what it finds in them, the corners, and the habits of torch's own optimizers."""

import copy
import gc
import io
import math
import os
import pickle
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.optim import lr_scheduler

import secondorder as so
from secondorder.optim._matrices import input_rows, matrices


def network(dtype=torch.float64, act=nn.Tanh, width=40):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(25, width), act(), nn.Linear(width, 20), act(), nn.Linear(20, 3)).to(dtype)


def batch(seed=0, m=32, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, 25, generator=generator, dtype=torch.float64)
    return x.to(dtype), (x[:, :3] + x[:, 3:6] * x[:, 6:9]).argmax(1)


def train(model, optimizer, seeds, loss=F.cross_entropy, **kwargs):
    losses = []
    for seed in seeds:
        x, y = batch(seed, **kwargs)
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return losses


def values(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def reloaded(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **options)


# --- the step -------------------------------------------------------------------------------------------------------------


def test_steps_equal_the_specification():
    """A whole run, renewals included, against an optimizer of a few lines on the operators' twins."""
    own, other = network(), network()
    optimizer = so.EigenAdam(own, rank=3, weight_decay=0.1)
    twin = so.EigenAdam(other, rank=3, weight_decay=0.1)
    for seed in range(12):
        train(own, optimizer, [seed])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("secondorder.optim.eigen_adam.ops", _Twins)
            train(other, twin, [seed])
        for a, b in zip(own.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


class _Twins:
    CONTROL = so.ops.CONTROL
    eigen_sketch_ = staticmethod(so.reference.eigen_sketch_)
    eigen_renew_ = staticmethod(so.reference.eigen_renew_)
    eigen_step_ = staticmethod(so.reference.eigen_step_)


def test_the_first_mean_is_the_inputs_own():
    model = network()
    optimizer = so.EigenAdam(model)
    x, y = batch()
    F.cross_entropy(model(x + 5), y).backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[model[0].weight]["mean"], x.mean(0) + 5)


def test_it_trains_ahead_of_adam():
    """In a third of the steps."""
    losses = {}
    for name, steps, make in [("own", 80, so.EigenAdam), ("adam", 240, lambda m: torch.optim.Adam(m.parameters(), 3e-3))]:
        model = network(torch.float32)
        seeds = [seed % 10 for seed in range(steps)]
        losses[name] = sum(train(model, make(model), seeds, dtype=torch.float32)[-10:])
    assert losses["own"] < losses["adam"]


@pytest.mark.parametrize("scale", [1e-10, 1e-4, 1e4, 1e10])
def test_the_scale_of_the_loss_changes_nothing(scale):
    plain, scaled = network(), network()
    train(plain, so.EigenAdam(plain), range(30))
    train(scaled, so.EigenAdam(scaled), range(30), loss=lambda z, y: scale * F.cross_entropy(z, y))
    torch.testing.assert_close(values(plain), values(scaled), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "m"),
    [
        (lambda x: 255 * x, 32),
        (lambda x: x + 10, 32),
        (lambda x: 0 * x, 32),
        (lambda x: x, 1),
        (lambda x: x, 4),
        (lambda x: 1e4 + x, 32),
    ],
    ids=["times 255", "plus 10", "zeros", "batch of 1", "batch of 4", "plus 10,000"],
)
@pytest.mark.parametrize("act", [nn.ReLU, nn.Sigmoid])
def test_odd_inputs_do_not_diverge(change, m, act):
    model = network(torch.float32, act)
    optimizer = so.EigenAdam(model)
    with torch.no_grad():
        before = float(F.cross_entropy(model(change(batch(99, dtype=torch.float32)[0])), batch(99)[1]))
    for seed in range(150):
        x, y = batch(seed, m, torch.float32)
        optimizer.zero_grad()
        F.cross_entropy(model(change(x)), y).backward()
        optimizer.step()
    with torch.no_grad():
        after = float(F.cross_entropy(model(change(batch(99, dtype=torch.float32)[0])), batch(99)[1]))
    assert math.isfinite(after)
    assert after < before + 0.5


@pytest.mark.parametrize("depth", [20, 30])
def test_deep_nets_do_not_diverge(depth):
    torch.manual_seed(0)
    act = nn.Tanh if depth == 20 else nn.Sigmoid
    model = nn.Sequential(
        nn.Linear(25, 16), act(), *[m for _ in range(depth) for m in (nn.Linear(16, 16), act())], nn.Linear(16, 3)
    )
    losses = train(model, so.EigenAdam(model), range(80), dtype=torch.float32)
    assert max(losses) < losses[0] + 1


def test_what_has_no_gradient_stays_where_it_is():
    """A dead unit, an input that is always zero, and a parameter that the loss does not contain."""
    model = network(torch.float32, nn.ReLU)
    with torch.no_grad():
        model[0].bias[5] = -1e6
    before = copy.deepcopy(model)
    optimizer = so.EigenAdam(model)
    for seed in range(60):
        x, y = batch(seed, dtype=torch.float32)
        x[:, 7] = 0
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for now, then, index in [
        (model[0].weight, before[0].weight, (5,)), (model[0].weight, before[0].weight, (slice(None), 7)),
        (model[0].bias, before[0].bias, (5,)), (model[2].weight, before[2].weight, (slice(None), 5)),
    ]:  # fmt: skip
        assert torch.equal(now[index], then[index])
    assert not torch.equal(model[0].weight, before[0].weight)


def test_weight_decay_shrinks_apart_from_the_gradient():
    """By lr times the step length times its value, also what has no gradient."""
    model = nn.Linear(30, 20).double()
    optimizer = so.EigenAdam(model, weight_decay=0.5)
    before = values(model)
    (0.0 * model(torch.ones(4, 30).double()).sum()).backward()
    length = optimizer.metrics()["length"]
    optimizer.step()
    torch.testing.assert_close(values(model), before * (1 - 0.5 * length))


def test_lr_multiplies_the_step():
    models = [network(), network()]
    before = values(models[0])
    for model, lr in zip(models, (1.0, 0.25), strict=True):
        train(model, so.EigenAdam(model, lr), [0])
    torch.testing.assert_close(0.25 * (values(models[0]) - before), values(models[1]) - before)


@pytest.mark.parametrize("poison", ["gradient", "input"])
def test_what_is_not_finite_raises_or_is_skipped(poison):
    for mode in ("error", "skip"):
        model = network(torch.float32)
        optimizer = so.EigenAdam(model, nonfinite=mode)
        train(model, optimizer, range(5), dtype=torch.float32)
        before, state = values(model), copy.deepcopy(optimizer.state_dict()["state"])
        optimizer.zero_grad()
        x, y = batch(0, dtype=torch.float32)
        if poison == "input":
            x[3, 4] = math.inf
        F.cross_entropy(model(x), y).backward()
        if poison == "gradient":
            model[2].weight.grad[0, 0] = math.nan
        if mode == "error":
            with pytest.raises(so.NonFiniteError, match="no parameter and no state has changed"):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.skipped_steps == 1
        assert torch.equal(values(model), before)
        for i, entries in optimizer.state_dict()["state"].items():
            for key, value in entries.items():
                if key not in ("control", "refused"):  # which count it
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[i][key])), key
        assert train(model, optimizer, [1], dtype=torch.float32)
        assert not torch.equal(values(model), before)


def test_a_loss_that_grows_a_thousandfold_is_told_of_once():
    """Where it is known: as the closure's value."""
    torch.manual_seed(0)
    model = nn.Linear(30, 1)
    optimizer = so.EigenAdam(model, lr=1e4)

    def closure():
        optimizer.zero_grad()
        loss = (model(torch.randn(16, 30)) ** 4).mean()
        loss.backward()
        return loss

    def twenty():
        for _ in range(20):
            optimizer.step(closure)

    with pytest.warns(UserWarning, match=r"the loss has grown from 0.153 to .*: training diverges") as caught:
        twenty()
    assert len(caught) == 1


# --- models ---------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.place = nn.Parameter(torch.randn(1, 6, 16) * 0.1)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x) + self.place).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 12, batch_first=True)
        self.gru = nn.GRU(12, 9, batch_first=True)
        self.head = nn.Linear(9, 3, bias=False)

    def forward(self, x):
        return self.head(self.gru(self.lstm(x)[0])[0][:, -1])


class Functional(nn.Module):
    """Weights that no module multiplies, one of them used twice; a layer called twice; a scalar."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(25, 25) / 5) for _ in range(2))
        self.shared, self.head, self.scale = nn.Linear(25, 25), nn.Linear(25, 3), nn.Parameter(torch.ones(()))

    def forward(self, x):
        x = torch.tanh(F.linear(x, self.first) @ self.second @ self.second)
        return self.scale * self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


def images(model):
    return model, lambda seed: (batch(seed, 16, torch.float32)[0][:, None].repeat(1, 4, 1).view(16, 4, 5, 5), batch(seed, 16)[1])


def tokens(seed):
    x, y = batch(seed, 16)
    return (x[:, :6] * 10).long().abs() % 30, y


MODELS = {
    "no bias": lambda: (nn.Sequential(nn.Linear(25, 30, bias=False), nn.ReLU(), nn.Linear(30, 3, bias=False)), None),
    "sequence": lambda: (
        nn.Sequential(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 4), nn.Flatten(), nn.Linear(20, 3)),
        lambda seed: (batch(seed, dtype=torch.float32)[0].view(-1, 5, 5), batch(seed)[1]),
    ),
    "convolutions": lambda: images(
        nn.Sequential(
            nn.Conv2d(4, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)
        )
    ),
    "transposed": lambda: images(
        nn.Sequential(
            nn.Conv2d(4, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(216, 3)
        )
    ),
    "attention": lambda: (Attention(), tokens),
    "recurrent": lambda: (Recurrent(), lambda seed: (batch(seed, dtype=torch.float32)[0].view(-1, 5, 5), batch(seed)[1])),
    "functional": lambda: (Functional(), None),
    "weight norm": lambda: (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(25, 30)), nn.Tanh(), nn.Linear(30, 3)),
        None,
    ),
    "linear": lambda: (nn.Linear(25, 3), None),
}


@pytest.mark.parametrize("given", ["model", "parameters", "parameters and model"])
@pytest.mark.parametrize("name", MODELS)
def test_any_model_trains(name, given):
    torch.manual_seed(0)
    model, data = MODELS[name]()
    data = data or (lambda seed: batch(seed, dtype=torch.float32))
    make = {
        "model": lambda: so.EigenAdam(model),
        "parameters": lambda: so.EigenAdam(model.parameters()),
        "parameters and model": lambda: so.EigenAdam([{"params": list(model.parameters())}], model=model),
    }
    optimizer = make[given]()
    losses = []
    for seed in range(40):
        x, y = data(seed % 4)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert torch.isfinite(values(model)).all()


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, bias=False),
        nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), groups=2, bias=False),
        nn.Conv2d(4, 6, (5, 3), padding="same", dilation=(1, 2), bias=False),
        nn.Conv3d(4, 6, 2, padding="valid", bias=False),
    ],
    ids=str,
)
def test_rows_of_a_convolution_are_its_patches(module):
    """All outputs, evenly spread or each once, are the rows times the weight."""
    module = module.double()
    x = torch.randn(3, 4, *[7, 8, 5][: len(module.kernel_size)], dtype=torch.float64)
    rows = input_rows(module, x)
    output = module(x).movedim(1, -1).reshape(-1, module.groups, 6 // module.groups)
    weight = module.weight.reshape(module.groups, 6 // module.groups, -1)
    product = torch.einsum("mgp,gnp->mgn", rows.view(-1, module.groups, rows.shape[1]), weight)
    torch.testing.assert_close(product, output[torch.arange(len(product)) * len(output) // len(product)])


def test_what_is_found_in_a_model():
    """Without it every matrix stands alone; with it layers have their biases, and tables and norms are no matrices."""
    found = {matrix.name: matrix for matrix in matrices(Attention().parameters(), None)}
    assert all(matrix.bias is None for matrix in found.values())
    model = Attention()
    found = {matrix.name: matrix for matrix in matrices(model.parameters(), model)}
    assert found["head.weight"].bias is model.head.bias
    assert found["encoder.linear1.weight"].eigen
    assert found["encoder.self_attn.in_proj_weight"].eigen
    assert not found["encoder.self_attn.in_proj_weight"].modules
    assert not found["embed.weight"].eigen
    assert not found["encoder.norm1.weight"].eigen
    assert "head.bias" not in found


def test_a_compiled_layer_is_told_of_once():
    model = network(torch.float32)
    optimizer = so.EigenAdam(model)
    optimizer.remove_hooks()
    with pytest.warns(UserWarning, match="sees no inputs of 0.weight, 2.weight, 4.weight") as caught:
        losses = train(model, optimizer, range(60), dtype=torch.float32)
    assert len(caught) == 1
    assert losses[-1] < losses[0]


def test_a_layer_that_shows_no_inputs_any_more_goes_on_from_its_gradients():
    """At first its basis stays, so that one forward pass in between does no harm; after some renewals a warning says so."""
    model = network(torch.float32)
    optimizer = so.EigenAdam(model)
    train(model, optimizer, range(10), dtype=torch.float32)
    optimizer.remove_hooks()
    before, scale = (optimizer.state[model[0].weight][key].clone() for key in ("basis_in", "scale_in"))
    train(model, optimizer, range(10, 20), dtype=torch.float32)
    torch.testing.assert_close(optimizer.state[model[0].weight]["basis_in"], before)
    with pytest.warns(UserWarning, match="sees no inputs of 0.weight, 2.weight, 4.weight"):
        train(model, optimizer, range(20, 60), dtype=torch.float32)
    assert (optimizer.state[model[0].weight]["basis_in"] - before).abs().max() > 0.01
    assert optimizer.state[model[0].weight]["scale_in"].max() < 0.1 * scale.max()  # the gradients' own


def test_transforms_of_the_model_are_left_alone():
    model = network()
    optimizer = so.EigenAdam(model)
    x, _ = batch()
    for _ in range(2):
        slopes = torch.vmap(torch.func.grad(lambda row: model(row).sum()))(x)
        hessians = torch.vmap(torch.func.hessian(lambda row: model(row).sum()))(x[:2])
        assert slopes.shape == (32, 25)
        assert hessians.shape == (2, 25, 25)
        train(model, optimizer, [0])


@pytest.mark.parametrize("change", ["prune", "spectral norm", "no rows", "nested"])
def test_forward_passes_that_show_nothing(change):
    model = network(torch.float32)
    optimizer = so.EigenAdam(model)
    train(model, optimizer, range(3), dtype=torch.float32)
    if change == "prune":
        prune.l1_unstructured(model[2], "weight", amount=0.3)
    elif change == "spectral norm":
        nn.utils.parametrizations.spectral_norm(model[2])
    elif change == "no rows":
        assert model(torch.zeros(0, 25)).shape == (0, 3)
    else:
        layer = nn.Linear(25, 4)
        so.EigenAdam(layer)
        assert layer(torch.nested.nested_tensor([torch.ones(2, 25), torch.ones(3, 25)], layout=torch.jagged)).requires_grad
    train(model, optimizer, range(3, 9), dtype=torch.float32)


def test_frozen_layers_have_no_state():
    model = network()
    model[2].requires_grad_(False)
    optimizer = so.EigenAdam(model)
    train(model, optimizer, range(6))
    assert not optimizer.state.get(model[2].weight)
    model[2].requires_grad_(True)
    optimizer.add_param_group({"params": model[2].parameters()})
    train(model, optimizer, range(6))


def test_a_bias_without_its_weight_is_trained():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's, that there is nothing to initialise
        model = nn.Sequential(nn.Linear(0, 5), nn.Linear(5, 3)).double()
    before = values(model)
    optimizer = so.EigenAdam(model)
    model[1].weight.requires_grad_(False)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.zeros(4, 0).double()), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    moved = (values(model) - before) != 0
    assert moved.tolist() == [True] * 5 + [False] * 15 + [True] * 3


def test_inputs_are_not_kept():
    model = network(torch.float32)
    optimizer = so.EigenAdam(model)
    x = torch.randn(32, 25)
    hidden = []
    handle = model[1].register_forward_hook(lambda module, args, output: hidden.append(weakref.ref(output)))
    loss = model(x).sum()
    assert hidden[0]() is not None
    loss.backward()
    del loss
    gc.collect()
    assert hidden[0]() is None
    optimizer.step()
    handle.remove()


def test_state_beyond_two_moments_is_small():
    model = nn.Linear(1000, 800)
    optimizer = so.EigenAdam(model)
    model(torch.randn(8, 1000)).square().sum().backward()
    optimizer.step()
    numbers = sum(v.numel() for v in optimizer.state[model.weight].values() if isinstance(v, torch.Tensor))
    assert numbers < 2 * 800 * 1000 + 10 * 8 * 1800


# --- habits ---------------------------------------------------------------------------------------------------------------


def test_values_of_groups_are_read_at_each_step():
    models = [network(), network()]
    optimizers = [so.EigenAdam(models[0]), so.EigenAdam(models[1], 0.5, weight_decay=0.2)]
    for group in optimizers[0].param_groups:
        group.update(lr=0.5, weight_decay=0.2)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(4))
    assert torch.equal(values(models[0]), values(models[1]))


@pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingLR", "OneCycleLR", "ReduceLROnPlateau", "LambdaLR"])
def test_schedulers(name):
    options = {
        "StepLR": {"step_size": 2}, "CosineAnnealingLR": {"T_max": 5}, "ReduceLROnPlateau": {},
        "OneCycleLR": {"max_lr": 1.0, "total_steps": 9, "cycle_momentum": False}, "LambdaLR": {"lr_lambda": lambda t: 0.5**t},
    }  # fmt: skip
    model = network()
    optimizer = so.EigenAdam(model)
    scheduler = getattr(lr_scheduler, name)(optimizer, **options[name])
    for seed in range(5):
        (loss,) = train(model, optimizer, [seed])
        scheduler.step(*[loss] if name == "ReduceLROnPlateau" else [])
    assert torch.isfinite(values(model)).all()


def test_a_scheduler_sets_the_step():
    model = network()
    optimizer = so.EigenAdam(model)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: 0.0 if t == 2 else 1.0)
    for t in range(4):
        before = values(model)
        train(model, optimizer, [t])
        assert torch.equal(values(model), before) == (t == 2)
        scheduler.step()


@pytest.mark.parametrize("at", [1, 5, 8, 16])
def test_a_resumed_run_is_the_same_to_the_bit(at):
    model = network()
    optimizer = so.EigenAdam(model)
    train(model, optimizer, range(at))
    other = network()
    other.load_state_dict(reloaded(model.state_dict()))
    resumed = so.EigenAdam(other)
    resumed.load_state_dict(reloaded(optimizer.state_dict()))
    train(model, optimizer, range(at, 24))
    train(other, resumed, range(at, 24))
    assert torch.equal(values(model), values(other))


def test_bfloat16_parameters_have_float32_state():
    model = network(torch.bfloat16)
    optimizer = so.EigenAdam(model)
    losses = train(model, optimizer, range(60), dtype=torch.bfloat16)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    other = copy.deepcopy(model)
    resumed = so.EigenAdam(other)
    resumed.load_state_dict(reloaded(optimizer.state_dict()))
    for state in resumed.state.values():
        assert {v.dtype for v in state.values() if isinstance(v, torch.Tensor)} <= {torch.float32, torch.float64}
    train(model, optimizer, range(7), dtype=torch.bfloat16)
    train(other, resumed, range(7), dtype=torch.bfloat16)
    assert torch.equal(values(model), values(other))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_copies_of_model_and_optimizer_train_alike(how):
    model = network()
    optimizer = so.EigenAdam(model)
    train(model, optimizer, range(6))
    other, copied = how((model, optimizer))
    train(model, optimizer, range(6, 14))
    train(other, copied, range(6, 14))
    assert torch.equal(values(model), values(other))


@pytest.mark.parametrize("moment", ["loaded", "converted"])
def test_state_follows_the_dtype(moment):
    model = network(torch.float32)
    optimizer = so.EigenAdam(model)
    train(model, optimizer, range(6), dtype=torch.float32)
    if moment == "converted":
        model.double()
    else:
        saved, model = reloaded(optimizer.state_dict()), network(torch.float64)
        optimizer = so.EigenAdam(model)
        optimizer.load_state_dict(saved)
    assert all(math.isfinite(loss) for loss in train(model, optimizer, range(6)))
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.float64


def test_a_checkpoint_before_the_first_step():
    model = network()
    optimizer = so.EigenAdam(model)
    model(batch()[0])
    so.EigenAdam(network()).load_state_dict(reloaded(optimizer.state_dict()))
    assert optimizer.metrics()["skipped_steps"] == 0


def test_a_foreign_state_is_refused():
    model = network()
    adam = torch.optim.Adam(model.parameters())
    train(model, adam, [0])
    optimizer = so.EigenAdam(model)
    with pytest.raises(ValueError, match="expected the state of an EigenAdam, got one of"):
        optimizer.load_state_dict(adam.state_dict())
    other = network(width=41)
    train(other, larger := so.EigenAdam(other), [0])
    with pytest.raises(ValueError, match=r"of shape \[40, 25\] for '0.weight', got one of \[41, 25\]"):
        optimizer.load_state_dict(larger.state_dict())
    train(model, optimizer, [0])
    with pytest.raises(ValueError, match="give both the model, or neither"):
        so.EigenAdam(model.parameters()).load_state_dict(optimizer.state_dict())


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
    assert optimizer._shared()["steps"] == 8
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


def test_groups_must_agree_where_one_number_serves_all():
    model = network()
    with pytest.raises(ValueError, match="expected betas to be two numbers"):
        so.EigenAdam([{"params": model.parameters(), "betas": (5.0, 5.0)}])
    with pytest.raises(ValueError, match="expected lr >= 0, got -5"):
        so.EigenAdam([{"params": model.parameters(), "lr": -5}])
    with pytest.raises(ValueError, match="more than one parameter group"):
        so.EigenAdam([{"params": model.parameters()}, {"params": [model[0].weight]}])
    optimizer = so.EigenAdam(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "betas": (0.5, 0.5)}], model=model
    )
    with pytest.raises(ValueError, match="expected betas to be the same in all param_groups"):
        train(model, optimizer, [0])


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


def test_lazy_layers():
    model = nn.Sequential(nn.LazyLinear(20), nn.Tanh(), nn.Linear(20, 3))
    optimizer = so.EigenAdam(model)
    model(torch.zeros(2, 25))
    losses = train(model, optimizer, range(40), dtype=torch.float32)
    assert losses[-1] < losses[0]


def test_bad_parameters_and_gradients():
    with pytest.raises(TypeError, match="expected parameters of a floating dtype, got torch.complex64"):
        so.EigenAdam([nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))])
    model = network()
    with pytest.raises(RuntimeError, match="expected gradients, found none"):
        so.EigenAdam(model).step()
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


# --- ranks ----------------------------------------------------------------------------------------------------------------


def _rank(rank, ranks, path, results, rows):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    model = DistributedDataParallel(network())
    optimizer = so.EigenAdam(model)
    for seed in range(12):
        x, y = batch(seed, sum(rows))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.split(rows)[rank]), y.split(rows)[rank])
        (loss * rows[rank] * ranks / sum(rows)).backward()
        optimizer.step()
    results[rank] = values(model).tolist()
    dist.destroy_process_group()


@pytest.mark.parametrize("rows", [(12, 12), (5, 12, 9), (250, 260)], ids=str)
def test_ranks_equal_one_process(rows, tmp_path):
    """Where one rank alone sees 256 rows, too, from which on a basis is larger."""
    ranks = len(rows)
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (ranks, os.fspath(tmp_path / "store"), results, rows), nprocs=ranks)
        found = [torch.tensor(results[rank], dtype=torch.float64) for rank in range(ranks)]
    model = network()
    optimizer = so.EigenAdam(model)
    train(model, optimizer, range(12), m=sum(rows))
    assert all(torch.equal(found[0], other) for other in found[1:])
    torch.testing.assert_close(found[0], values(model), rtol=1e-6, atol=1e-8)
