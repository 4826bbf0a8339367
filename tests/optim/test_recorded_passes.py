"""Which forward and backward passes a step takes into account, and what the tape keeps of them."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from helpers.training import batch, network, one_step
from torch import nn

import secondorder as so


def test_nothing_is_recorded_in_eval_mode_or_without_grad():
    criterion, model, (x, y) = nn.CrossEntropyLoss(), network(), batch()
    optimizer = so.LayerwiseNewton(model, criterion)
    one_step(model, criterion, optimizer, x, y)
    optimizer.zero_grad()
    with torch.no_grad():
        criterion(model(x), y)
    model.eval()
    criterion(model(x), y).backward()
    with pytest.raises(RuntimeError, match="no call of the criterion .* model in training mode"):
        optimizer.step()
    model.train()
    one_step(model, criterion, optimizer, x, y)


def trace(optimizer, layer):
    return float(optimizer.state[layer.weight]["factors"]["bias_hessian"].trace())


def traces_after(model, backward, **kwargs):
    """The traces of all bias Hessians after one step from what `backward(model, optimizer)` did."""
    optimizer = so.EACG(model, nn.CrossEntropyLoss(), **kwargs)
    backward(model, optimizer)
    optimizer.step()
    return torch.tensor([trace(optimizer, layer) for layer in model if isinstance(layer, nn.Linear)])


def plain(model, optimizer, factor=1.0, seed=0):
    x, y = batch(seed=seed)
    (factor * optimizer.criterion(model(x), y)).backward()


def two_batches_in_one_backward(model, optimizer):
    losses = [optimizer.criterion(model(batch(seed=s)[0]), batch(seed=s)[1]) for s in (0, 1)]
    (losses[0] + losses[1]).backward()


def two_batches_in_two(model, optimizer):
    plain(model, optimizer, seed=0)
    plain(model, optimizer, seed=1)


def two_losses_of_one_output(model, optimizer):
    x, y = batch()
    z = model(x)
    (0.25 * optimizer.criterion(z, y) + 0.75 * optimizer.criterion(z, y)).backward()


def after_autograd_grad(model, optimizer):
    x, y = batch()
    loss = optimizer.criterion(model(x), y)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    loss.backward()


def after_zeroed_gradients(set_to_none, frozen_head=False):
    def run(model, optimizer):
        plain(model, optimizer, seed=5)
        model[-1].requires_grad_(not frozen_head)
        model.zero_grad(set_to_none=set_to_none)  # not the optimizer's, which would know
        plain(model, optimizer)

    return run


def same_graph_after_zero_grad(model, optimizer):
    x, y = batch()
    loss = optimizer.criterion(model(x), y)
    loss.backward(retain_graph=True)
    optimizer.zero_grad()
    loss.backward()


def creating_a_graph(model, optimizer):
    x, y = batch()
    optimizer.criterion(model(x), y).backward(create_graph=True)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (two_batches_in_one_backward, two_batches_in_two),
        (two_losses_of_one_output, plain),
        (after_autograd_grad, plain),
        (after_zeroed_gradients(True), plain),
        (after_zeroed_gradients(False), plain),
        (same_graph_after_zero_grad, plain),
        (creating_a_graph, plain),
    ],
    ids=lambda f: f.__qualname__.split(".")[0],
)
def test_what_counts_as_a_backward_pass(run, expected):
    torch.testing.assert_close(traces_after(network(), run), traces_after(network(), expected))


def test_zero_grad_forgets():
    def skip_one(model, optimizer):
        plain(model, optimizer, seed=5)
        optimizer.zero_grad(set_to_none=False)
        for p in model.parameters():
            p.grad.add_(1e-30)  # so that only zero_grad itself can have told
        plain(model, optimizer)

    torch.testing.assert_close(traces_after(network(), skip_one), traces_after(network(), plain))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x, head):
        return getattr(self, head)(torch.tanh(self.trunk(x)))


def test_heads_trained_by_backward_passes_of_their_own():
    torch.manual_seed(0)
    model, criterion, (x, y) = TwoHeads().double(), nn.CrossEntropyLoss(), batch()
    optimizer = so.LayerwiseNewton(model, criterion)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no curvature covers.*")
        warnings.filterwarnings("ignore", message=".*is used in several places.*")
        for head in ("a", "b"):
            criterion(model(x, head), y).backward()
        optimizer.step()
    for layer in (model.trunk, model.a, model.b):
        assert trace(optimizer, layer) > 0


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_a_factor_on_the_loss_is_one_on_fisher_blocks_too(factor):
    def run(reduction, factor):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()
        criterion = nn.CrossEntropyLoss(reduction=reduction)
        optimizer = so.LayerwiseNewton(model, criterion)
        x, y = batch(11)
        (factor * criterion(model(x), y)).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        return torch.tensor([trace(optimizer, model[0]), trace(optimizer, model[3])])

    torch.testing.assert_close(run("mean", factor), factor * run("mean", 1.0))
    torch.testing.assert_close(run("sum", factor), 11 * factor * run("mean", 1.0))


def test_a_loss_that_is_maximised():
    """The criterion's Hessian is then negative, and Pos-Eig must see it: PCH-1 has the magnitude of the minimised loss's."""
    top = [traces_after(network(), lambda m, o, f=f: plain(m, o, f))[-1] for f in (1.0, -1.0)]
    torch.testing.assert_close(top[1], top[0])


def live_tensors():
    gc.collect()
    return {id(o): o for o in gc.get_objects() if type(o) is torch.Tensor and o.numel() > 8}


def test_no_memory_is_held_between_steps_nor_by_forward_passes_alone():
    criterion, model, (x, y) = nn.CrossEntropyLoss(), network(activation=nn.Mish), batch(50)
    optimizer = so.LayerwiseNewton(model, criterion)
    for _ in range(2):
        one_step(model, criterion, optimizer, x, y)
    optimizer.zero_grad()
    before = live_tensors()
    for _ in range(3):
        criterion(model(x), y)  # a forward pass that nobody goes backward through
    loss = criterion(model(x), y)  # held, with its graph, as training loops do
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    kept = [o.shape for i, o in live_tensors().items() if i not in before]
    assert not [shape for shape in kept if 50 in shape]


def test_a_discarded_backward_pass_is_forgotten():
    criterion = nn.CrossEntropyLoss()
    models = [network(), network()]
    optimizers = [so.LayerwiseNewton(model, criterion) for model in models]
    criterion(models[0](batch(seed=9)[0]), batch(seed=9)[1]).backward()
    models[0].zero_grad()  # not the optimizer's, which would know
    for model, optimizer in zip(models, optimizers, strict=True):
        criterion(model(batch()[0]), batch()[1]).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_two_backward_passes_through_one_graph():
    criterion, model, (x, y) = nn.CrossEntropyLoss(), network(), batch()
    twin = copy.deepcopy(model)
    optimizer, other = so.LayerwiseNewton(model, criterion), so.LayerwiseNewton(twin, criterion)
    loss = criterion(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    (2 * criterion(twin(x), y)).backward()
    optimizer.step()
    other.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_copies_of_the_model_are_not_recorded():
    criterion, model, (x, y) = nn.CrossEntropyLoss(), network(), batch()
    optimizer = so.LayerwiseNewton(model, criterion)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not clone(x).grad_fn.metadata
    one_step(model, criterion, optimizer, x, y)


def test_hooks_go_with_the_optimizer():
    criterion, model, (x, y) = nn.CrossEntropyLoss(), network(), batch()
    traces = {"forward", "_compiled_call_impl"}
    hooks = lambda: sum(len(traces & vars(m).keys()) for m in [*model.modules(), criterion])  # noqa: E731
    optimizer = so.LayerwiseNewton(model, criterion)
    assert hooks() == 6
    optimizer.remove_hooks()
    assert hooks() == 0
    optimizer = so.LayerwiseNewton(model, criterion)
    one_step(model, criterion, optimizer, x, y)
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    assert hooks() == 0


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("curvature", ["pch-abs", "kflr", "fisher-empirical"])
def test_an_empty_micro_batch_adds_nothing(curvature, reduction):
    updated = []
    for parts in ([slice(0, 8)], [slice(0, 8), slice(0, 0)]):
        model, criterion, (x, y) = network(), nn.CrossEntropyLoss(reduction=reduction), batch()
        optimizer = so.EACG(model, criterion, 0.1, curvature=curvature)
        for part in parts:
            criterion(model(x[part]), y[part]).backward()
        optimizer.step()
        updated.append(model)
    for p, q in zip(*(model.parameters() for model in updated), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("curvature", ["pch-abs", "kflr", "fisher-mc", "fisher-empirical"])
def test_backward_for_some_parameters_alone(curvature):
    model, criterion, (x, y) = network(), nn.CrossEntropyLoss(), batch()
    optimizer = so.EACG(model, criterion, 0.1, curvature=curvature)
    before = copy.deepcopy(model)
    criterion(model(x), y).backward(inputs=[model[4].weight, model[4].bias])
    optimizer.step()
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[4].weight, before[4].weight)
