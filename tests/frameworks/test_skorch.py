"""skorch: the class by a word, options by prefix, and the recipe for optimizers of a model and a criterion."""

import numpy as np
import pytest
import torch
from helpers.frameworks import criterion_for, dataset, imported, plain_loop, quiet, values
from torch import nn

import secondorder as so

skorch = imported("skorch")
pytestmark = quiet

X, Y = (t.numpy() for t in dataset().tensors)


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3))


class OfModel(skorch.NeuralNetClassifier):
    """Gives the optimizer the model as well."""

    def initialize_optimizer(self):
        args, kwargs = self.get_params_for_optimizer("optimizer", self.get_all_learnable_params())
        self.optimizer_ = self.optimizer(*args, model=self.module_, **kwargs)
        return self


class OfModelAndCriterion(skorch.NeuralNetClassifier):
    """Gives the optimizer the model and the criterion, and no parameters."""

    def initialize_optimizer(self):
        _, kwargs = self.get_params_for_optimizer("optimizer", self.get_all_learnable_params())
        self.optimizer_ = self.optimizer(self.module_, self.criterion_, **kwargs)
        return self


def fitted(optimizer, kind=skorch.NeuralNetClassifier, epochs=2, **options):
    torch.manual_seed(1)
    options = {"criterion": nn.CrossEntropyLoss, "lr": 1.0, "train_split": None, **options}
    net = kind(Net, optimizer=optimizer, max_epochs=epochs, batch_size=32, verbose=0, **options)
    return net.fit(X, Y)


def test_the_class_alone():
    net = fitted(so.EigenAdam, epochs=8)
    losses = net.history[:, "train_loss"]
    assert losses[-1] < losses[0] - 0.1


def test_options_by_prefix_and_groups():
    options = {"optimizer__weight_decay": 0.1, "optimizer__rank": 4, "optimizer__param_groups": [("0.*", {"lr": 0.5})]}
    net = fitted(so.EigenAdam, **options)
    assert [group["lr"] for group in net.optimizer_.param_groups] == [0.5, 1.0]
    assert {group["weight_decay"] for group in net.optimizer_.param_groups} == {0.1}
    assert len(net.optimizer_.state[net.module_[0].weight]["basis_out"]) == 4


def test_the_lr_of_another_optimizer_is_warned_of():
    with pytest.warns(UserWarning, match="lr=0.01 multiplies the step that EigenAdam finds by itself, .* 100 times shorter"):
        fitted(so.EigenAdam, lr=0.01)


def test_with_the_model():
    net = fitted(so.EigenAdam, OfModel)
    assert torch.equal(values(net.module_), values(plain_loop("EigenAdam")))


@pytest.mark.parametrize(("name", "lr"), [("EACG", 0.02), ("LayerwiseNewton", 1.0), ("KBFGS", 0.3)])
def test_with_the_model_and_the_criterion(name, lr):
    net = fitted(getattr(so, name), OfModelAndCriterion, lr=lr)
    assert torch.equal(values(net.module_), values(plain_loop(name)))


def test_a_regressor_steps_by_closures():
    torch.manual_seed(1)
    squares = criterion_for("LevenbergMarquardt")
    options = {"criterion": type(squares), "lr": 1.0, "train_split": None, "optimizer__race": False}
    net = skorch.NeuralNet(Net, optimizer=so.LevenbergMarquardt, max_epochs=2, batch_size=32, verbose=0, **options)
    net.fit(X, Y)
    assert torch.equal(values(net.module_), values(plain_loop("LevenbergMarquardt")))


def test_it_is_cloned_and_searched():
    search = imported("sklearn.model_selection").GridSearchCV(
        skorch.NeuralNetClassifier(Net, criterion=nn.CrossEntropyLoss, optimizer=so.EigenAdam, max_epochs=1, verbose=0),
        {"lr": [0.5, 1.0]}, cv=2, scoring="accuracy", error_score="raise",
    )  # fmt: skip
    search.fit(X, Y)
    assert np.isfinite(search.best_score_)


def test_a_saved_optimizer_goes_on(tmp_path):
    whole = fitted(so.EigenAdam, OfModel, epochs=3)
    first = fitted(so.EigenAdam, OfModel, epochs=2)
    files = {"f_params": tmp_path / "net.pt", "f_optimizer": tmp_path / "optimizer.pt"}
    first.save_params(**files)
    options = {"criterion": nn.CrossEntropyLoss, "lr": 1.0, "train_split": None, "optimizer": so.EigenAdam}
    second = OfModel(Net, max_epochs=1, batch_size=32, verbose=0, **options).initialize()
    second.load_params(**files)
    second.partial_fit(X, Y)
    assert torch.equal(values(second.module_), values(whole.module_))
