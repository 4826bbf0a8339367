"""EACG's steps in CUDA graphs, without a GPU.

A replay launches the captured step's kernels with the numbers that they were given then. So is a step that is captured, as far as
Python can tell, while the counts go on on the device: Python counts nothing, and gives the operators the same numbers each time.
"""

import copy
import dataclasses
import math
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers.captures import capturing
from helpers.eigen import batch, network, values
from helpers.host_reads import HostReads
from helpers.training import assert_same
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import secondorder as so
from secondorder._tape.records import LossCall
from secondorder.criteria import analytic_hessian
from secondorder.optim import _captures

pytestmark = pytest.mark.filterwarnings("ignore:secondorder:")  # of the fallback and of the empirical Fisher block


class Mixed(nn.Module):
    """Layers with and without a bias, parameters of the fallback, and a layer at which the recursion starts anew."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(25))
        self.layers = nn.Sequential(
            nn.Linear(25, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 12, bias=False), nn.Sigmoid(), nn.Linear(12, 3)
        )

    def forward(self, x):
        return self.layers(x * self.scale)


def mixed():
    torch.manual_seed(0)
    return Mixed().double()


DATA = [batch(seed) for seed in range(7)]


def steps(model, optimizer, batches, captured=False, change=lambda t: None):
    """Steps in a row, as replays of a CUDA graph make them if they are captured."""
    for t, (x, y) in enumerate(batches):
        with capturing() if captured else nullcontext():
            optimizer.zero_grad()
            optimizer.criterion(model(x), y).backward()
            optimizer.step()
        change(t)


def made(make=network, criterion=F.cross_entropy, **options):
    """A model with an optimizer that steps are captured of, and their twins."""
    model = make()
    twin = copy.deepcopy(model)
    return (
        model,
        so.EACG(model, criterion, **{"lr": 0.3, **options}, capturable=True),
        twin,
        so.EACG(twin, criterion, **{"lr": 0.3, **options}),
    )


def assert_alike(model, optimizer, twin, eager):
    """Shares and learning rates are rounded elsewhere; without kernels a solve may end elsewhere."""
    close = {key: 1e-9 if so.build_info()["extension"] else 1e-5 for key in ("rtol", "atol")}
    torch.testing.assert_close(values(model), values(twin), **close)
    own, other = optimizer.state_dict(), eager.state_dict()
    torch.testing.assert_close(own["state"], other["state"], **close)
    assert [group["skipped_steps"] for group in own["param_groups"]] == [g["skipped_steps"] for g in other["param_groups"]]


OPTIONS = {
    "defaults": {},
    "no momentum": {"momentum": 0.0},
    "no averages of factors": {"factor_decay": 0.0, "max_step": None, "lr": 0.01},
    "averages": {"average": True},
    "decay": {"weight_decay": 0.1},
    "coupled decay": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "truncated": {"solver": "ea-cg-truncated", "curvature": "pch-clip", "momentum": 0.0},
    "empirical Fisher": {"curvature": "fisher-empirical"},
    "samples": {"curvature_samples": 10},
    "maximize": {"maximize": True, "lr": 0.01},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("make", [network, mixed])
@pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
def test_replays_make_the_steps_that_would_be_made(make, options, on_device):
    model, optimizer, twin, eager = made(make, **options)
    if on_device:
        optimizer.param_groups[0]["lr"] = torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64)
    for batches, captured in ((DATA[:2], False), (DATA, True), (DATA[:3], False), (DATA[3:], True), (DATA[:1], False)):
        steps(model, optimizer, batches, captured)
        steps(twin, eager, batches)
        if captured:  # Python has counted nothing, and graphs find the state where it was
            assert optimizer.state[next(m for m in model.modules() if isinstance(m, nn.Linear)).weight]["step"] in (2, 12)
    assert_alike(model, optimizer, twin, eager)
    assert optimizer.metrics() == pytest.approx(eager.metrics(), rel=1e-6)


@pytest.mark.parametrize(
    "criterion", [nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss(), so.criteria.TukeyBiweightLoss(2)]
)
def test_criteria_whose_hessian_has_a_formula(criterion):
    model, optimizer, twin, eager = made(criterion=criterion, average=True)
    data = DATA if isinstance(criterion, nn.CrossEntropyLoss) else [(x, F.one_hot(y, 3).to(x)) for x, y in DATA]
    for own, other, captured in ((model, optimizer, True), (twin, eager, False)):
        steps(own, other, data[:2])
        steps(own, other, data[2:], captured)
    assert_alike(model, optimizer, twin, eager)


def test_the_state_stays_in_its_places():
    model, optimizer, _, _ = made(mixed, average=True)
    steps(model, optimizer, DATA[:2])
    steps(model, optimizer, DATA[:1], captured=True)

    def places():
        return [t.data_ptr() for t in tree_leaves(list(optimizer.state.values())) if isinstance(t, torch.Tensor)]

    before = places()
    steps(model, optimizer, DATA)
    steps(model, optimizer, DATA[:1], captured=True)
    assert places() == before and len(before) > 20


def test_steps_without_a_capture_are_the_same_to_the_bit():
    model, optimizer, twin, eager = made(mixed, average=True)
    steps(model, optimizer, DATA)
    steps(twin, eager, DATA)
    assert_same([model.state_dict(), optimizer.state_dict()], [twin.state_dict(), eager.state_dict()])


@pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("make", [network, mixed])
def test_a_captured_step_reads_nothing_on_the_host(make, on_device):
    model = make().float()
    data = [(x.float(), y) for x, y in DATA]
    lr = torch.tensor(0.3)
    tensors = [lr, *model.parameters(), *(t for pair in data for t in pair)]
    with HostReads(tensors):
        optimizer = so.EACG(
            model, nn.CrossEntropyLoss(), lr=lr if on_device else 0.3, average=True, weight_decay=0.1, capturable=True
        )
        steps(model, optimizer, data[:2])
        optimizer._replays._counts._on_device = True
    with HostReads(tensors) as reads:
        steps(model, optimizer, data[:2], captured=True)
    assert not reads.found
    with HostReads(tensors) as reads:
        optimizer.state_dict()
    assert sum(reads.found.values()) == 1


class NoCopies(TorchDispatchMode):
    """Refuses what brings numbers from one device to another, which a capture does not allow."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)}
        assert len(devices) <= 1, func
        return result


def fakes_of(value, there, found):
    """The records with tensors that are a GPU's but have no numbers."""
    if isinstance(value, torch.Tensor):
        if value not in found:
            found[value] = there(value)
        return found[value]
    if isinstance(value, list):
        return [fakes_of(each, there, found) for each in value]
    if dataclasses.is_dataclass(value) and type(value).__module__.startswith("secondorder"):
        if id(value) not in found:
            found[id(value)] = own = copy.copy(value)
            for field in dataclasses.fields(value):
                object.__setattr__(own, field.name, fakes_of(getattr(value, field.name), there, found))
        return found[id(value)]
    return value


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("make", [network, mixed])
def test_a_captured_step_moves_nothing_between_devices(make, monkeypatch):
    """On tensors that are a GPU's but have no numbers: to read them, or to mix them with the CPU's, is an error."""
    model, optimizer, _, _ = made(make, average=True, weight_decay=0.1)
    steps(model, optimizer, DATA[:2])
    with capturing():
        optimizer.criterion(model(DATA[0][0]), DATA[0][1]).backward()
    records, losses, state = optimizer._tape.records(), optimizer._tape.losses, dict(optimizer.state)
    with FakeTensorMode(), capturing(), torch.no_grad():  # autograd would ask for the device

        def there(t):
            return torch.empty(t.shape, dtype=t.dtype, device="cuda:0")

        found = {p: nn.Parameter(there(p)) for p in model.parameters()}
        for module in model.modules():
            module._parameters.update({name: found.get(p) for name, p in module._parameters.items()})
        fake = so.EACG(model, nn.CrossEntropyLoss(), average=True, weight_decay=0.1)
        fake._allow_captures("pch-abs", "ea-cg")
        fake.param_groups[0]["lr"] = torch.empty((), device="cuda:0")
        for p, own in state.items():
            fake.state[found[p]] = torch.utils._pytree.tree_map_only(torch.Tensor, there, own)
            found[p].grad = there(p)
        fake._replays._counts = there(optimizer._replays._counts)
        fake._tape._log.losses = fakes_of(losses, there, found)
        own = fakes_of(records, there, found)
        monkeypatch.setattr(so.EACG, "_records", lambda self: own)
        monkeypatch.setattr(_captures, "has_kernels", lambda device: True)
        with NoCopies():
            for loss in fake._tape.losses:
                assert isinstance(loss, LossCall) and loss.assumed.device.type == "cuda"
                loss.hessian = analytic_hessian(nn.CrossEntropyLoss(), there(torch.empty(32, 3)).double(), there(DATA[0][1]))
            fake.step()
    assert fake._replays


def test_learning_rates_on_the_device_are_followed():
    trained = []
    for captured in (False, True):
        model = mixed()
        lr = torch.tensor(0.3, dtype=torch.float64) if captured else 0.3
        optimizer = so.EACG(model, F.cross_entropy, lr=lr, weight_decay=0.1, capturable=captured)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.8**t)
        steps(model, optimizer, DATA[:2], change=lambda t, s=scheduler: s.step())
        steps(model, optimizer, DATA * 2, captured, change=lambda t, s=scheduler: s.step())
        trained.append(values(model))
    torch.testing.assert_close(*trained, rtol=1e-9, atol=1e-9)


def poison_input(model, x, y, lr):
    return x * math.nan, y


def ignored_target(model, x, y, lr):
    return x, torch.where(torch.arange(len(y)) == 3, -100, y)


def far_input(model, x, y, lr):
    return x * 1e200, y


def rate_of_nan(model, x, y, lr):
    lr.fill_(math.nan)
    return x, y


def rate_below_zero(model, x, y, lr):
    lr.fill_(-0.1)
    return x, y


def rate_above_one(model, x, y, lr):
    lr.fill_(1.1)
    return x, y


@pytest.mark.parametrize("bad", [poison_input, ignored_target, far_input, rate_of_nan, rate_below_zero, rate_above_one])
@pytest.mark.parametrize("nonfinite", ["error", "skip"])
def test_replays_that_are_refused_change_nothing_and_are_counted(bad, nonfinite):
    model = mixed()
    lr = torch.tensor(0.3, dtype=torch.float64)
    optimizer = so.EACG(model, nn.CrossEntropyLoss(), lr=lr, average=True, weight_decay=0.1, nonfinite=nonfinite, capturable=True)
    steps(model, optimizer, DATA[:2])
    steps(model, optimizer, DATA[:3], captured=True)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
    steps(model, optimizer, [bad(model, x, y, lr) for x, y in DATA[:2]], captured=True)
    assert_same([model.state_dict(), optimizer.state_dict()["state"]], before)
    assert optimizer.skipped_steps == 2 == optimizer.metrics()["skipped_steps"]
    lr.fill_(0.3)
    if nonfinite == "error":
        with pytest.raises(so.NonFiniteError, match="2 replays of CUDA graphs have met NaN or inf, a target that"):
            steps(model, optimizer, DATA[:1])
        assert_same(model.state_dict(), before[0])
    steps(model, optimizer, DATA[:1])
    steps(model, optimizer, DATA[:1], captured=True)
    assert not torch.equal(values(model), torch.cat([t.flatten() for t in before[0].values()]))
    assert optimizer.state_dict()["state"][1]["step"] == 7
    assert optimizer.skipped_steps == 2


def test_a_gradient_of_the_fallback_that_is_not_finite_refuses_the_step():
    model, optimizer, _, _ = made(mixed, nonfinite="skip")
    steps(model, optimizer, DATA[:2])
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
    with capturing():
        optimizer.zero_grad()
        optimizer.criterion(model(DATA[0][0]), DATA[0][1]).backward()
        model.scale.grad[3] = math.nan
        optimizer.step()
    assert_same([model.state_dict(), optimizer.state_dict()["state"]], before)
    assert optimizer.skipped_steps == 1


def refused(optimizer, model, batches, match, captured=True):
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    with pytest.raises(RuntimeError, match=match):
        steps(model, optimizer, batches, captured)
    assert_same([model.state_dict(), optimizer.state_dict()], before)


def test_the_first_step_is_made_without_a_capture():
    model, optimizer, _, _ = made()
    match = (
        r"EACG.step\(\): expected a step that makes the state .* before one is captured in a CUDA graph; call step\(\) without"
    )
    refused(optimizer, model, DATA[:1], match)
    steps(model, optimizer, DATA[:1])
    steps(model, optimizer, DATA, captured=True)
    optimizer.load_state_dict(optimizer.state_dict())
    refused(optimizer, model, DATA[:1], match)
    steps(model, optimizer, DATA[:1])
    steps(model, optimizer, DATA, captured=True)
    assert optimizer.state_dict()["state"][0]["step"] == 16
    optimizer.param_groups[0]["lr"] = 0.1
    model[0].requires_grad_(False)
    steps(model, optimizer, DATA, captured=True)
    assert [optimizer.state_dict()["state"][i]["step"] for i in (0, 2)] == [16, 23]


def test_a_layer_that_has_no_state_yet_is_not_captured():
    model, optimizer, _, _ = made()
    model[0].requires_grad_(False)
    steps(model, optimizer, DATA[:2])
    steps(model, optimizer, DATA[:2], captured=True)
    model[0].requires_grad_(True)
    refused(optimizer, model, DATA[:1], "a step that makes the state of all parameters")
    steps(model, optimizer, DATA[:1])
    steps(model, optimizer, DATA[:2], captured=True)
    assert [optimizer.state_dict()["state"][i]["step"] for i in (0, 2)] == [3, 7]


def tied():
    """Two layers with one weight but biases of their own, which the fallback updates."""
    torch.manual_seed(0)
    sizes = (25, 12, 12, 12, 3)
    layers = [nn.Linear(k, n) for k, n in zip(sizes, sizes[1:], strict=False)]
    layers[2].weight = layers[1].weight
    return nn.Sequential(*(each for layer in layers[:-1] for each in (layer, nn.Tanh())), layers[-1]).double()


def test_a_weight_that_two_layers_share_is_counted_once():
    model, optimizer, twin, eager = made(tied, average=True)
    for own, other, captured in ((model, optimizer, True), (twin, eager, False)):
        steps(own, other, DATA[:2])
        steps(own, other, DATA, captured)
    assert_alike(model, optimizer, twin, eager)


def test_averages_go_by_the_layer_with_most_steps_though_it_is_frozen():
    models = []
    for captured in (False, True):
        model = network()
        optimizer = so.EACG(model, F.cross_entropy, lr=0.3, average=True, capturable=captured)
        model[2:].requires_grad_(False)
        steps(model, optimizer, DATA[:4])
        model[2:].requires_grad_(True)
        model[0].requires_grad_(False)
        steps(model, optimizer, DATA[:1])
        steps(model, optimizer, DATA[:4], captured)
        with optimizer.averaged_parameters():
            models.append(values(model))
    torch.testing.assert_close(*models, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"solver": "kfi"},
            "expected solver 'ea-cg' or 'ea-cg-truncated' with capturable=True, got 'kfi'",
        ),
        ({"curvature": "kflr"}, "expected curvature 'pch-abs', .* with capturable=True, got 'kflr'"),
        ({"curvature_every": 5}, "expected curvature_every 1 with capturable=True, got 5"),
    ],
)
def test_what_reads_numbers_is_refused_at_once(options, match):
    with pytest.raises(ValueError, match=match):
        so.EACG(network(), nn.CrossEntropyLoss(), capturable=True, **options)


def test_schedulers_need_a_learning_rate_on_the_device(monkeypatch):
    model, optimizer, _, _ = made()
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    steps(model, optimizer, DATA[:2])
    refused(optimizer, model, DATA[:1], r"an lr that is a tensor on the parameters' device where a scheduler.* got 0\.09999")
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    monkeypatch.setattr(so.EACG, "_on_device", lambda self, lr: False)
    refused(optimizer, model, DATA[:1], "an lr that is a tensor on the parameters' device .* got one on cpu")


def test_passes_and_step_are_captured_together():
    match = "expected forward pass, backward pass and step to be captured in one CUDA graph, or none of them"
    for captured in (False, True):
        model, optimizer, _, _ = made()
        steps(model, optimizer, DATA[:2])
        alone = "passes" if captured else "the step"
        with capturing() if captured else nullcontext():
            optimizer.criterion(model(DATA[0][0]), DATA[0][1]).backward()
        with (
            nullcontext() if captured else capturing(),
            pytest.raises(RuntimeError, match=f"{match}, got {alone} alone"),
        ):
            optimizer.step()
        steps(model, optimizer, DATA[:2])


class Unknown(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.5 * x)


UNKNOWN = nn.Sequential(nn.Linear(25, 6), Unknown(), nn.Linear(6, 3)).double()
TIED = nn.Sequential(nn.Linear(25, 25), nn.Tanh(), nn.Linear(25, 25), nn.Tanh(), nn.Linear(25, 3)).double()
TIED[2].bias = TIED[0].bias


def squares(output, target):
    return (output - F.one_hot(target, 3)).pow(2).mean()


@pytest.mark.parametrize(
    ("model", "criterion", "match"),
    [
        (
            UNKNOWN,
            F.cross_entropy,
            "no derivatives by autograd of what follows layer '0' .* where a CUDA graph is being captured",
        ),
        (network(), squares, "no Hessian of .*squares.* by autograd where a CUDA graph is being captured"),
        (network(), so.criteria.BoundedClassificationLoss(), "no eigenvalues of a criterion's Hessian where a CUDA graph"),
        (network(), nn.CrossEntropyLoss(torch.ones(3).double()), "where the criterion weighs or ignores targets"),
        (TIED, F.cross_entropy, "expected weights of 32 bits or more, and biases that each belong to one layer"),
        (network(dtype=torch.bfloat16), F.cross_entropy, "expected weights of 32 bits or more, and biases that each"),
    ],
)
def test_models_and_criteria_that_read_numbers_are_refused(model, criterion, match):
    model = copy.deepcopy(model)
    data = [(x.to(next(model.parameters()).dtype), y) for x, y in DATA]
    optimizer = so.EACG(model, criterion, lr=0.1, capturable=True)
    steps(model, optimizer, data[:2])
    refused(optimizer, model, data[:1], match)
    steps(model, optimizer, data[:1])


def test_ignored_targets_are_refused_before_a_capture():
    model, optimizer, _, _ = made(criterion=nn.CrossEntropyLoss())
    ignoring = [ignored_target(model, x, y, None) for x, y in DATA]
    steps(model, optimizer, ignoring[:2])
    refused(optimizer, model, DATA[:1], "expected no capture of a CUDA graph where the criterion weighs or ignores targets")
    steps(model, optimizer, DATA[:1])
    steps(model, optimizer, DATA, captured=True)
    assert optimizer.skipped_steps == 0


def test_micro_batches_are_not_captured():
    model, optimizer, _, _ = made()
    steps(model, optimizer, DATA[:2])
    with capturing(), pytest.raises(RuntimeError, match="no second backward pass before a step where a CUDA graph"):
        optimizer.zero_grad()
        for x, y in DATA[:2]:
            optimizer.criterion(model(x), y).backward()
    with capturing(), pytest.raises(RuntimeError, match="no second loss of one output where a CUDA graph"):
        optimizer.zero_grad()
        output = model(DATA[0][0])
        (optimizer.criterion(output, DATA[0][1]) + optimizer.criterion(output, DATA[1][1])).backward()
        optimizer.step()


def test_a_bias_in_a_group_of_its_own():
    models = []
    for captured in (False, True):
        model = network()
        lr = torch.tensor(0.3, dtype=torch.float64) if captured else 0.3
        optimizer = so.EACG(model, F.cross_entropy, lr=lr, capturable=captured)
        biases = [p for p in model.parameters() if p.dim() == 1]
        optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p.dim() == 2]
        optimizer.add_param_group({"params": biases})
        steps(model, optimizer, DATA[:2])
        steps(model, optimizer, DATA, captured)
        models.append(values(model))
    torch.testing.assert_close(*models, rtol=1e-9, atol=1e-9)
    optimizer.param_groups[1]["lr"] = lr.clone()
    refused(optimizer, model, DATA[:1], "biases that each belong to one layer and have its weight's learning rate")


def test_a_step_of_gradscaler_is_not_captured():
    model, optimizer, _, _ = made()
    steps(model, optimizer, DATA[:2])
    optimizer.found_inf = torch.zeros(())
    refused(optimizer, model, DATA[:1], r"expected no capture of a CUDA graph within GradScaler.step\(\)")


def test_a_step_of_several_ranks_is_not_captured(monkeypatch):
    model, optimizer, _, _ = made()
    steps(model, optimizer, DATA[:2])
    monkeypatch.setattr(so.EACG, "_ranks", object())
    refused(optimizer, model, DATA[:1], "expected no capture of a CUDA graph where several ranks train")


def test_plain_pytorch_is_not_captured(monkeypatch):
    model, optimizer, _, _ = made()
    steps(model, optimizer, DATA[:2])
    monkeypatch.setattr(_captures, "has_kernels", lambda device: False)
    refused(optimizer, model, DATA[:1], r"EACG.step.* expected kernels for CUDA where .* \(docs/install.md\)$")


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_have_the_counts_and_no_graph(how):
    model, optimizer, twin, eager = made(network, nn.CrossEntropyLoss())
    steps(model, optimizer, DATA[:2])
    steps(model, optimizer, DATA, captured=True)
    steps(twin, eager, DATA[:2] + DATA)
    model, optimizer = how((model, optimizer))
    assert not optimizer._replays
    steps(model, optimizer, DATA)
    steps(twin, eager, DATA)
    steps(model, optimizer, DATA, captured=True)
    steps(twin, eager, DATA)
    assert_alike(model, optimizer, twin, eager)
