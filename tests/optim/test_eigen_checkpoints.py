"""EigenAdam's state: checkpoints, copies, dtypes, and files of the model."""

import copy
import io
import math
import pickle

import pytest
import torch
from helpers.eigen import batch, network, reloaded, train, values
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

import secondorder as so


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
    older = optimizer.state_dict()
    older["state"][0] |= {"control": older["state"][0]["control"][:7]}
    with pytest.raises(ValueError, match="expected a control of 8 entries, got 7, of another version"):
        optimizer.load_state_dict(older)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_files_of_the_model_need_no_package_and_scripts_need_no_hooks():
    model = network()
    optimizer = so.EigenAdam(model)
    train(model, optimizer, range(2))
    file = io.BytesIO()
    torch.save(model, file)
    assert b"secondorder" not in file.getvalue()
    file.seek(0)
    for clone in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(clone(batch()[0]), model(batch()[0]))
    with pytest.raises(AttributeError, match=r"call optimizer.remove_hooks\(\) before torch.jit.script"):
        torch.jit.script(model)
    optimizer.remove_hooks()
    assert torch.equal(torch.jit.script(model)(batch()[0]), model(batch()[0]))


def test_hooks_that_are_copied_without_their_options_show_nothing():
    """As torch.ao.quantization copies them onto the layers that it puts in a trained model's place."""
    model = network()
    optimizer = so.EigenAdam(model)
    train(model, optimizer, range(2))
    x, _ = batch()
    expected = model(x)
    for i in (0, 2, 4):
        layer = torch.nn.Linear(model[i].in_features, model[i].out_features).double()
        layer.load_state_dict(model[i].state_dict())
        for hook in model[i]._forward_hooks.values():
            layer.register_forward_hook(hook)
        model[i] = layer
    assert torch.equal(model(x), expected)
    assert torch.equal(torch.nn.Sequential(*model)(input=x), expected)
    model[0](input=x)


def test_what_a_wrapper_keeps_in_the_state_is_saved_with_it():
    """As the slow weights of a Lookahead."""

    def steps(model, optimizer, seeds):
        for seed in seeds:
            train(model, optimizer, [seed])
            with torch.no_grad():
                for p in model.parameters():
                    slow = optimizer.state[p].setdefault("slow", p.clone())
                    slow.lerp_(p, 0.5)
                    p.copy_(slow)

    model, other = network(), network()
    optimizer, resumed = so.EigenAdam(model), so.EigenAdam(other)
    steps(model, optimizer, range(7))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(reloaded(optimizer.state_dict()))
    steps(model, optimizer, range(7, 12))
    steps(other, resumed, range(7, 12))
    assert torch.equal(values(model), values(other))


@pytest.mark.parametrize("kind", ["closure", "bias Hessian"])
def test_torchs_full_state_dicts_go_into_a_new_optimizer(kind):
    def started(seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        if kind == "closure":
            return model, so.EigenAdam(model)
        return model, so.EigenAdam(model, curvature="pch-abs", criterion=torch.nn.functional.mse_loss)

    def steps(model, optimizer):
        for x in torch.randn(9, 20, 4, generator=torch.Generator().manual_seed(2)):

            def closure(x=x):
                optimizer.zero_grad()
                criterion = torch.nn.functional.mse_loss if optimizer.criterion is None else optimizer.criterion
                loss = criterion(model(x), x[:, :1])
                loss.backward()
                return loss

            optimizer.step(closure)

    options = StateDictOptions(full_state_dict=True)
    model, optimizer = started(0)
    steps(model, optimizer)
    other, resumed = started(1)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, resumed, get_optimizer_state_dict(model, optimizer, options=options), options=options)
    steps(model, optimizer)
    steps(other, resumed)
    assert torch.equal(values(model), values(other))
