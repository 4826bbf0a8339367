"""torch.compile with every optimizer."""

import pytest
import torch
from helpers.habits import batch, every, network, step
from helpers.optimizers import ALL, parameters
from torch import nn
from torch.nn import functional as F

import secondorder as so


class Plain(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.c, self.function = nn.Linear(5, 7), nn.Linear(7, 4), nn.Linear(4, 3), function

    def forward(self, x):
        return self.c(self.function(self.b(self.function(self.a(x)))))

    def __getitem__(self, index):
        return self.a


@every
@pytest.mark.parametrize("how", ["around", "inside", "method"])
@pytest.mark.parametrize("function", [torch.tanh, F.mish])
def test_a_compiled_model_trains_as_ever(name, how, function):
    criterion, results = nn.CrossEntropyLoss(), []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        own = called = given = Plain(function).double()
        if compiled and how == "method":
            own.compile(backend="aot_eager")
        elif compiled:
            called = torch.compile(own, backend="aot_eager")
            given = called if how == "around" else own
        optimizer = ALL[name](given, criterion)
        torch.manual_seed(3)
        for seed in range(3):
            step(_Called(called, own), optimizer, *batch(seed))
        results.append(parameters(own))
    assert torch.equal(*results)


class _Called:
    def __init__(self, called, own):
        self.called, self.own = called, own

    def __call__(self, x):
        return self.called(x)

    def __getitem__(self, index):
        return self.own[index]


def test_evaluation_is_compiled_as_one_graph():
    torch.compiler.reset()
    model = network()
    optimizer = so.LayerwiseNewton(model, nn.CrossEntropyLoss())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, _ = batch()
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))
    optimizer.remove_hooks()
    assert "forward" not in vars(model)


def test_a_compiled_part_of_the_model_does_not_pass_for_the_whole():
    model = network()
    optimizer = so.EACG(model, nn.CrossEntropyLoss(), lr=0.1)
    x, y = batch()
    torch.compiler.reset()
    part = torch.compile(lambda x: model[2](torch.tanh(model[0](x))), backend="aot_eager")
    with pytest.raises(RuntimeError, match="inside a compiled graph"):
        optimizer.criterion(model[4](torch.tanh(part(x))), y)
    function = torch.compile(torch.tanh, backend="aot_eager")
    with pytest.raises(RuntimeError, match="what follows layer '0' runs inside a compiled graph"):
        model[2](function(model[0](x)))
    with pytest.raises(RuntimeError, match="the criterion, or what comes before it, runs inside a compiled graph"):
        optimizer.criterion(function(model(x)), y)
