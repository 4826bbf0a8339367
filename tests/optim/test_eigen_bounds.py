"""EigenAdam where the loop clamps or masks weights after a step."""

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from helpers.eigen import batch, network, reloaded, train, values
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import secondorder as so
from secondorder.optim._eigen import bounds as of_bounds
from secondorder.optim._eigen.bounds import LoopChanges
from secondorder.optim._eigen.matrices import Matrix

NONE = {"low": float("inf"), "high": -float("inf")}


def bounds(state):
    """What a state says that the loop sets elements to; None: it sets none, or it is a bias' state."""
    found = tuple(state[key] for key in NONE if key in state)
    return found if found and found != tuple(NONE.values()) else None


class Positive(nn.Module):
    """Gives numbers a large mean, which a step takes from the weights into the bias."""

    def forward(self, x):
        return x.abs() + 1


class Masked(nn.Conv1d):
    """A causal convolution, as it is often written."""

    def forward(self, x):
        self.weight.data[:, :, 2:] *= 0
        return super().forward(x)


def clamped(make, low, high):
    """The mean loss of the last 20 of 150 steps of a regression whose weights the loop clamps."""
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    y = x.abs().sum(1, keepdim=True)
    y = (y - y.mean()) / y.std()
    model = nn.Sequential(nn.Linear(6, 48), nn.Softplus(), nn.Linear(48, 48), nn.Softplus(), nn.Linear(48, 1))
    optimizer, losses = make(model), []
    for _ in range(150):
        rows = torch.randint(400, (64,))
        optimizer.zero_grad()
        loss = F.mse_loss(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        for layer in (model[2], model[4]):
            layer.weight.data.clamp_(low, high)
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


@pytest.mark.parametrize(("low", "high"), [(0, None), (None, 0), (-0.1, 0.1)])
def test_clamped_weights_train(low, high):
    adam = clamped(lambda model: torch.optim.Adam(model.parameters(), 1e-2), low, high)
    assert clamped(so.EigenAdam, low, high) < 1.2 * adam


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_weight_decay_takes_no_element_off_its_bound(decay):
    """An element that is pushed against its bound stays there, in every step."""
    model = network()
    optimizer = so.EigenAdam(model, weight_decay=decay)
    weight = model[2].weight
    for seed in range(4):
        train(model, optimizer, [seed])
        weight.data.clamp_(-0.05, 0.05)
    assert bounds(optimizer.state[weight]) == (-0.05, 0.05)
    gradients(model, 9)
    outwards = (weight.abs() == 0.05) & (weight * weight.grad < 0)
    assert outwards.any()
    optimizer.step()
    assert (weight[outwards].abs() > 0.05).all()


def masks_of(model):
    generator = torch.Generator().manual_seed(3)
    return {p: torch.rand(p.shape, generator=generator) < 0.2 for p in model.parameters() if p.dim() == 2}


def mask(weights):
    with torch.no_grad():
        for p, kept in weights.items():
            p *= kept


def masked(make):
    """The mean loss of the last 20 of 200 steps of a classification with masked weights."""
    torch.manual_seed(1)
    model = nn.Sequential(Positive(), nn.Linear(25, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 3))
    weights = masks_of(model)
    mask(weights)
    optimizer, losses = make(model), []
    for step in range(200):
        losses += train(model, optimizer, [step % 5], dtype=torch.float32, m=64)
        mask(weights)
    return sum(losses[-20:]) / 20


def test_masked_weights_train():
    assert masked(so.EigenAdam) < 1.5 * masked(lambda model: torch.optim.Adam(model.parameters(), 1e-2))


def trained_with_masks(steps=4):
    model = network()
    weights = masks_of(model)
    mask(weights)
    optimizer = so.EigenAdam(model)
    for seed in range(steps):
        train(model, optimizer, [seed])
        mask(weights)
    return model, optimizer


def gradients(model, seed):
    x, y = batch(seed)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


def test_elements_that_the_loop_sets_count_as_those_without_a_gradient():
    """A step equals one whose gradient is zero there, but for rounding units of these elements, which point downhill."""
    model, optimizer = trained_with_masks()
    other, plain = copy.deepcopy((model, optimizer))
    for each in (model, other):
        gradients(each, 9)
    before = [p.detach().clone() for p in model.parameters()]
    downhill = [-p.grad.sign() for p in model.parameters()]
    for p in other.parameters():
        assert bounds(plain.state[p]) == ((0.0, 0.0) if p.dim() == 2 else None)
        plain.state[p].update(NONE)
        p.grad *= p != 0
    optimizer.step()
    plain.step()
    for p, q, old, direction in zip(model.parameters(), other.parameters(), before, downhill, strict=True):
        held = old == 0
        assert torch.equal(p[~held], q[~held])
        assert torch.equal(p[held].sign(), direction[held])
        assert p[held].abs().sum() < 1e-300


def test_elements_that_the_loop_holds_no_more_train():
    model, optimizer = trained_with_masks()
    weights = masks_of(model)
    train(model, optimizer, range(20, 60))
    assert all((p[~kept].abs() > 1e-4).float().mean() > 0.9 for p, kept in weights.items())


def test_a_convolution_that_masks_its_weight_in_its_forward():
    torch.manual_seed(0)
    model = nn.Sequential(Masked(2, 8, 3, padding=1), nn.ReLU(), Masked(8, 1, 3, padding=1))
    optimizer = so.EigenAdam(model)
    for _ in range(3):
        x = torch.randn(9, 2, 20)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert [bounds(optimizer.state[model[i].weight]) for i in (0, 2)] == [(0.0, 0.0)] * 2


@pytest.mark.parametrize("how", ["average", "noise", "shrink", "restore", "rescale"])
def test_other_changes_by_the_loop_hold_nothing(how):
    model = network()
    optimizer, old = so.EigenAdam(model), copy.deepcopy(model.state_dict())
    for seed in range(4):
        train(model, optimizer, [seed])
        with torch.no_grad():
            for name, p in model.named_parameters():
                if how == "average":
                    p.lerp_(old[name], 0.5)
                elif how == "noise":
                    p.add_(torch.randn_like(p), alpha=0.01)
                elif how == "shrink":
                    p[:1] *= 0.9
                elif how == "restore":
                    p.copy_(old[name])
                elif p.dim() == 2:
                    p.copy_(p.renorm(2, 0, 0.5))
    assert not any(map(bounds, optimizer.state.values()))


@pytest.mark.parametrize("where", ["held", "free"])
def test_a_step_that_is_refused_moves_no_element(where):
    model, optimizer = trained_with_masks()
    gradients(model, 9)
    weight = model[2].weight
    weight.grad[(weight == 0) if where == "held" else (weight != 0)] = float("nan")
    before = values(model)
    with pytest.raises(so.NonFiniteError):
        optimizer.step()
    assert torch.equal(values(model), before)
    assert masks_go_on_alike(model, optimizer, copy.deepcopy((model, optimizer)))


def test_a_resumed_run_is_the_same_to_the_bit():
    model, optimizer = trained_with_masks()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    resumed = so.EigenAdam(other)
    resumed.load_state_dict(reloaded(optimizer.state_dict()))
    assert masks_go_on_alike(model, optimizer, (other, resumed))


def saved_by_dcp(model, optimizer, path):
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=path)


def loaded_by_dcp(model, optimizer, path):
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_dcp_resumes_is_the_same_to_the_bit(tmp_path):
    model, optimizer = trained_with_masks()
    saved_by_dcp(model, optimizer, tmp_path)
    other = network()
    resumed = so.EigenAdam(other)
    loaded_by_dcp(other, resumed, tmp_path)
    assert masks_go_on_alike(model, optimizer, (other, resumed))


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_from_before_the_loop_set_elements_is_loaded(tmp_path):
    model, optimizer = trained_with_masks(1)
    saved_by_dcp(model, optimizer, tmp_path)
    other, resumed = trained_with_masks()
    loaded_by_dcp(other, resumed, tmp_path)
    assert not any(map(bounds, resumed.state.values()))


def test_a_flattened_state_has_what_the_loop_sets_elements_to():
    model, optimizer = trained_with_masks()
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    other = copy.deepcopy(model)
    resumed = so.EigenAdam(other)
    set_optimizer_state_dict(other, resumed, get_optimizer_state_dict(model, optimizer, options=flat), options=flat)
    assert masks_go_on_alike(model, optimizer, (other, resumed))


def masks_go_on_alike(model, optimizer, others):
    for each, its in ((model, optimizer), others):
        weights = masks_of(each)
        for seed in range(30, 36):
            train(each, its, [seed])
            mask(weights)
    return torch.equal(values(model), values(others[0]))


def test_a_weight_whose_learning_rate_is_zero_moves_nowhere():
    model, optimizer = trained_with_masks()
    weights = [p for p in model.parameters() if p.dim() == 2]
    frozen = so.EigenAdam(
        [{"params": weights, "lr": 0.0}, {"params": [p for p in model.parameters() if p.dim() == 1]}], model=model
    )
    for p in weights:
        frozen.state[p].update(copy.deepcopy(optimizer.state[p]))
    before = [p.detach().clone() for p in weights]
    train(model, frozen, range(3))
    assert all(map(torch.equal, weights, before))


def test_a_gpu_is_not_waited_for(monkeypatch):
    """What the loop has done is noted once a GPU has told, in a later step; where ranks must note it alike, in the next one."""
    told = {"here": False}

    class Late:
        def __init__(self, t):
            self.t = t

        @property
        def here(self):
            return told["here"]

        def read(self):
            assert told["here"] or told["alike"]
            return self.t

    matrix = Matrix(torch.ones(4, 5), None, "weight", True)
    states = {matrix.weight: {"basis_out": None, **NONE}}
    monkeypatch.setattr(of_bounds, "Arriving", Late)
    monkeypatch.setattr(of_bounds, "_summary", lambda *each, of=of_bounds._summary: OnGpu(of(*each)))
    for alike in (False, True):
        told.update(here=False, alike=alike)
        changes = LoopChanges()
        changes.note_made([matrix])
        matrix.weight[:2] = 0.0
        changes.look(states, alike)
        assert not bounds(states[matrix.weight])
        changes.look(states, alike)
        assert bool(bounds(states[matrix.weight])) == alike
        told["here"] = True
        changes.look(states, alike)
        assert bounds(states[matrix.weight]) == (0.0, 0.0)
        states[matrix.weight].update(NONE)
        matrix.weight.fill_(1.0)


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says otherwise."""

    is_cuda = True

    def __new__(cls, t):
        return t.as_subclass(cls)
