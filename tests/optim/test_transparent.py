"""A model that an optimizer has been made for shows nothing of it: signature, copies, files, exports, scripts, traces."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.optimizers import ALL
from torch import nn

import secondorder as so


class Net(nn.Module):
    """Its forward has a signature, and names of this file."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, input_ids: torch.Tensor, flip: bool = False) -> torch.Tensor:
        h = F.relu(self.hidden(input_ids))
        return self.head(h.flip(0) if flip else h)


every = pytest.mark.parametrize("name", ["EACG", "LayerwiseNewton", "KFAC", "KBFGS"])
X = torch.arange(20.0).reshape(4, 5) / 10


def made(name):
    model = Net()
    return model, ALL[name](model, nn.CrossEntropyLoss())


@pytest.mark.parametrize("name", ALL)
def test_the_forward_has_its_own_signature_and_no_hooks(name):
    model, _optimizer = made(name)
    assert inspect.signature(model.forward) == inspect.signature(Net().forward)
    assert inspect.getsource(model.forward) == inspect.getsource(Net.forward)
    assert inspect.ismethod(model.forward)
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model.forward(X, flip=True), Net()(X, flip=True))


@every
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("training", [True, False])
def test_exports_scripts_and_traces(name, training):
    model, optimizer = made(name)
    model.train(training)
    for version in (
        torch.export.export(model, (X,)).module(),
        torch.jit.script(model),
        torch.jit.trace(model, X),
        torch.fx.symbolic_trace(model, concrete_args={"flip": False}),
    ):
        torch.testing.assert_close(version(X), Net()(X))
    model.train()

    def closure():
        optimizer.zero_grad()
        loss = optimizer.criterion(model(X), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        return loss

    optimizer.step(closure)  # and it goes on


@every
def test_copies_and_files_are_plain(name):
    model, optimizer = made(name)
    file = io.BytesIO()
    torch.save(model, file)
    assert b"secondorder" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    average = torch.optim.swa_utils.AveragedModel(model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded, average.module):
        output = clone(X)
        assert torch.equal(output, Net()(X))
        assert not output.grad_fn.metadata
        assert "_compiled_call_impl" not in vars(clone.hidden)
        assert clone.forward.__func__ is Net.forward
    assert not optimizer._tape.losses


def test_hooks_may_be_taken_off_in_any_order_and_compiled_calls_stay():
    model, criterion = Net(), nn.CrossEntropyLoss()
    calls = []
    model.hidden._compiled_call_impl = lambda *args: calls.append(1) or model.hidden._call_impl(*args)
    before = model.hidden._compiled_call_impl
    optimizers = [so.EACG(model, criterion), so.LayerwiseNewton(model, criterion), so.KFLR(model, criterion)]
    criterion(model(X), torch.tensor([0, 1, 2, 0])).backward()
    assert len(calls) == 1
    assert all(len(optimizer._tape.losses) == 1 for optimizer in optimizers)
    for i in (1, 0, 2):
        optimizers[i].remove_hooks()
    assert model.hidden._compiled_call_impl is before
    assert "_compiled_call_impl" not in vars(model.head)
    assert "_compiled_call_impl" not in vars(criterion)
