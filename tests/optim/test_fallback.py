"""Parameters that no curvature covers: the fallback updates them, and a warning names them and the reason."""

import copy
import warnings

import pytest
import torch
from helpers.training import batch, one_step
from torch import nn

import secondorder as so


class Mixed(nn.Module):
    """A convolution and a norm before two linear layers, and a parameter of the model's own."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 2, 3), nn.LayerNorm(6)
        self.hidden, self.frozen, self.out = nn.Linear(6, 5), nn.Linear(5, 5).requires_grad_(False), nn.Linear(5, 3)
        self.shift = nn.Parameter(torch.zeros(5))

    def forward(self, x):
        h = self.norm(torch.relu(self.conv(x.unsqueeze(1))).flatten(1))
        return self.out(torch.tanh(self.frozen(torch.tanh(self.hidden(h) + self.shift))))


def test_uncovered_parameters_get_the_fallback_and_one_warning():
    model, criterion, (x, y) = Mixed().double(), nn.CrossEntropyLoss(), batch()
    optimizer = so.EACG(model, criterion, lr=0.1, momentum=0.5, weight_decay=0.2)
    with pytest.warns(UserWarning, match="'shift', 'conv.weight', 'conv.bias', 'norm.weight', 'norm.bias'.*fallback, SGD"):
        one_step(model, criterion, optimizer, x, y)
    sgd = copy.deepcopy(model)
    reference = [p for n, p in sgd.named_parameters() if n.split(".")[0] in ("conv", "norm", "shift")]
    covered = [n for n, _ in model.named_parameters() if n.split(".")[0] in ("hidden", "out")]
    buffers = [p.grad.clone() for n, p in model.named_parameters() if n.split(".")[0] in ("conv", "norm", "shift")]
    before = {n: p.clone() for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_step(model, criterion, optimizer, x, y)
    sgd.zero_grad()
    criterion(sgd(x), y).backward()
    for p, buffer in zip(reference, buffers, strict=True):
        p.data = p.data * (1 - 0.1 * 0.2) - 0.1 * (0.5 * buffer + p.grad)
    for name, p in sgd.named_parameters():
        if name not in covered:
            torch.testing.assert_close(dict(model.named_parameters())[name], p)
    assert all(not torch.equal(before[n], dict(model.named_parameters())[n]) for n in covered)
    assert torch.equal(before["frozen.weight"], model.frozen.weight)
    strict = so.LayerwiseNewton(model, criterion, fallback="error")
    with pytest.raises(RuntimeError, match="no curvature covers the parameters 'shift'.*fallback='error'"):
        one_step(model, criterion, strict, x, y)


@pytest.mark.parametrize(
    "make", [lambda *a: so.EACG(*a, lr=0.1), so.LayerwiseNewton, so.KFRA, so.KBFGS], ids=["lr", "EACG", "KFRA", "KBFGS"]
)
def test_a_bias_of_two_layers_hides_no_other_parameter(make):
    class Scaled(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * self.scale

    model = Scaled(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5)).double()
    model[2].bias = model[0].bias
    model.scale = nn.Parameter(torch.full((5,), 2.0).double())
    criterion, x, y = nn.MSELoss(), torch.randn(9, 4).double(), torch.randn(9, 5).double()
    optimizer = make(model, criterion)
    before = model.scale.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="'scale'; they are updated by the fallback"):
        optimizer.step(closure)
    assert (model.scale != before).all()


def test_a_non_elementwise_function_warns_once_and_trains():
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()
    criterion, (x, y) = nn.CrossEntropyLoss(), batch()
    optimizer = so.LayerwiseNewton(model, criterion)
    with pytest.warns(UserWarning) as caught:
        losses = [one_step(model, criterion, optimizer, x, y) for _ in range(10)]
    messages = [str(w.message) for w in caught]
    assert sum("layer '0' goes through a function that is not elementwise" in m for m in messages) == 1
    assert sum("'1.weight', '1.bias'; they are updated by the fallback, SGD" in m for m in messages) == 1
    assert losses[-1] < losses[0]


def test_one_warning_names_all_layers_where_the_recursion_starts_anew():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, h):
            return h + self.b(torch.tanh(self.a(self.norm(h))))

    model = nn.Sequential(nn.Linear(5, 6), *(Block() for _ in range(3)), nn.Linear(6, 3)).double()
    criterion, (x, y) = nn.CrossEntropyLoss(), batch()
    optimizer = so.EACG(model, criterion)
    with pytest.warns(UserWarning) as caught:
        losses = [one_step(model, criterion, optimizer, x, y) for _ in range(2)]
    assert losses[1] < losses[0]
    (message,) = [str(w.message) for w in caught if "recursion" in str(w.message)]
    assert "the output of each of the layers '0', '1.b', '2.b' is used in several places" in message
    assert "the output of layer '3.b' is combined with other linear layers" in message
    assert "Each of these layers gets its empirical Fisher block" in message


def test_a_layer_whose_weight_is_frozen_is_named_as_the_reason():
    model, criterion = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), nn.CrossEntropyLoss()
    model[0].weight.requires_grad_(False)
    optimizer = so.EACG(model, criterion)
    criterion(model(torch.randn(8, 4)), torch.arange(8) % 3).backward()
    with pytest.warns(UserWarning, match=r"'0.bias' \(the weight of layer '0' is frozen\)"):
        optimizer.step()
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="weights of its nn.Linear layers are frozen.*EigenAdam trains any model"):
        so.EACG(model, criterion)


@pytest.mark.filterwarnings("ignore:secondorder")
@pytest.mark.parametrize("make", [so.EACG, so.KFAC, so.LayerwiseNewton, so.KFRA, so.KFLR])
@pytest.mark.parametrize("idle", ["frozen", "without a gradient"])
def test_the_fallback_alone_trains_where_no_layer_that_is_covered_does(make, idle):
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)), nn.CrossEntropyLoss()
    optimizer = make(model, criterion, max_factor_dim=4, **({"average": True} if make in (so.EACG, so.KFAC) else {}))
    x, y = torch.randn(60, 4), torch.randint(3, (60,))
    if idle == "frozen":
        model[2].requires_grad_(False)
    else:
        for p in model[2].parameters():
            p.register_hook(torch.zeros_like)
    losses = [one_step(model, criterion, optimizer, x, y) for _ in range(20)]
    assert losses[-1] < losses[0] - 0.01
    if idle == "frozen" and isinstance(optimizer, so.EACG | so.KFAC):
        last = model[0].weight.detach().clone()
        with optimizer.averaged_parameters():
            torch.testing.assert_close(model[0].weight, last)


@pytest.mark.filterwarnings("ignore:secondorder")
@pytest.mark.parametrize("make", [so.EACG, so.KFAC, so.LayerwiseNewton, so.KFRA, so.KFLR])
@pytest.mark.parametrize("why", ["frozen", "wide"])
def test_the_error_where_no_layer_has_a_curvature_says_so(make, why):
    model, criterion = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), nn.CrossEntropyLoss()
    optimizer = make(model, criterion, max_factor_dim=1 if why == "wide" else None)
    if why == "frozen":
        model[1:].requires_grad_(False)
    x, y = torch.randn(30, 4), torch.randint(3, (30,))
    with pytest.raises(RuntimeError, match="every one that the loss reaches is frozen or has more outputs than max_factor_dim"):
        one_step(model, criterion, optimizer, x, y)


def test_eigen_adam_takes_gradients_once_all_layers_with_a_bias_hessian_are_frozen():
    model, criterion = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 5)), nn.CrossEntropyLoss()
    optimizer = so.EigenAdam(model, curvature="pch-abs", criterion=criterion)
    model[1].requires_grad_(False)
    x, y = torch.randn(30, 4), torch.randint(3, (30,))
    losses = [one_step(model, criterion, optimizer, x, y) for _ in range(9)]
    assert losses[-1] < losses[0]
