"""Checkpoints of version 0.1 go on as they would have."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from helpers.habits import batch, every, network, step
from helpers.optimizers import ALL
from helpers.training import assert_same
from torch import nn

import secondorder as so

# Written by 0.1: a model and its optimizer after the batches 0 to 6, and the model after 7 to 10.
CHECKPOINTS = torch.load(Path(__file__).with_name("checkpoints_0_1.pt"), weights_only=True)


CONTINUED = {
    "EACG": lambda m, c: so.EACG(m, c, 0.1, curvature_every=2, weight_decay=0.01),
    "LayerwiseNewton": lambda m, c: so.LayerwiseNewton(m, c, weight_decay=0.01),
    "LayerwiseNewton, exact": lambda m, c: so.LayerwiseNewton(m, c, solver="exact", average=True),
    "KFRA": so.KFRA,
    "KFLR": so.KFLR,
    "KBFGS": lambda m, c: so.KBFGS(m, c, scale=None, max_step=None),
}


def continued(name, make):
    """The model after the batches 7 to 10, from version 0.1's checkpoint."""
    model, saved = network(), CHECKPOINTS[name]
    model.load_state_dict(saved["model"])
    optimizer = make(model, nn.CrossEntropyLoss())
    optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    for seed in range(7, 11):
        step(model, optimizer, *batch(seed))
    return model.state_dict()


@pytest.mark.parametrize("name", CONTINUED)
def test_a_checkpoint_of_0_1_goes_on_as_it_would_have(name):
    for key, value in continued(name, CONTINUED[name]).items():
        torch.testing.assert_close(value, CHECKPOINTS[name]["after"][key], rtol=1e-9, atol=1e-12)


def test_the_dampings_of_0_1_are_those_that_go_on():
    saved = CHECKPOINTS["LayerwiseNewton"]["optimizer"]
    optimizer = so.LayerwiseNewton(network(), nn.CrossEntropyLoss())
    optimizer.load_state_dict(copy.deepcopy(saved))
    (before,), (after,) = saved["param_groups"], optimizer.param_groups
    assert after["loss_trend"] == before["watch"]
    assert [after[key] for key in ("tau", "gamma", "rho")] == [before[key] for key in ("tau", "gamma", "rho")]


def test_what_0_1_kept_for_conjugate_gradients_is_not_used():
    """It kept the factors of up to `inverse_every` steps ago, as if they had been a factorisation."""
    kept, fresh = (
        continued("EACG, kron-cg", lambda m, c, n=n: so.EACG(m, c, 0.1, solver="kron-cg", inverse_every=n, curvature_every=2))
        for n in (5, 1)
    )
    assert_same(kept, fresh)


def test_a_checkpoint_of_the_other_kind_of_step_says_where_it_belongs():
    model, criterion = network(), nn.CrossEntropyLoss()
    found, given = so.LayerwiseNewton(model, criterion), so.EACG(network(), criterion)
    for saved in (found.state_dict(), CHECKPOINTS["LayerwiseNewton"]["optimizer"]):
        with pytest.raises(ValueError, match=r"got one of an optimizer that finds its own step.*secondorder\.LayerwiseNewton"):
            given.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"got one of an optimizer with a learning rate; load it into secondorder\.EACG"):
        found.load_state_dict(given.state_dict())


@every
@pytest.mark.parametrize("version", ["0.1.0", None])
def test_an_optimizer_that_another_version_has_pickled_whole_is_refused(name, version, monkeypatch):
    optimizer = ALL[name](network(), nn.CrossEntropyLoss())
    with monkeypatch.context() as older:
        if version is None:  # before pickles had one
            state = optimizer.__getstate__()
            del state["_version"]
            older.setattr(type(optimizer), "__getstate__", lambda _: state)
        else:
            older.setattr(so, "__version__", version)
        saved = pickle.dumps(optimizer)
    with pytest.raises(
        RuntimeError, match=rf"secondorder {so.__version__} has pickled, got one of {version or 'another'}.*state_"
    ):
        pickle.loads(saved)
