"""EigenAdam's steps in CUDA graphs, without a GPU.

A replay launches the captured step's kernels with the numbers that they were given then. So is a step that is captured, as far as
Python can tell, while `control` goes on: Python counts nothing, and gives the operators the same numbers each time.
"""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers.captures import capturing
from helpers.eigen import batch, network, train, values
from helpers.host_reads import HostReads
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import secondorder as so
from secondorder.ops.eigen import STEPS
from secondorder.optim import _captures
from secondorder.optim._eigen import layer_inputs


class Mixed(nn.Module):
    """Maps with and without inputs, a table, and numbers that stand for themselves."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.conv = nn.Conv1d(8, 12, 3, padding=1)
        self.norm = nn.LayerNorm(12)
        self.lstm = nn.LSTM(12, 10, batch_first=True)
        self.head = nn.Linear(10, 3, bias=False)

    def forward(self, x):
        return self.head(self.lstm(self.norm(self.conv(self.embed(x).movedim(1, 2)).movedim(1, 2)))[0][:, -1])


def mixed():
    torch.manual_seed(0)
    model = Mixed().double()
    return model, [(torch.randint(30, (16, 6)), torch.randint(3, (16,))) for _ in range(5)]


def plain():
    return network(), [batch(seed) for seed in range(5)]


def padded():
    """Rows that the loss leaves out, and that bound the mean inputs of all layers."""
    model, data = plain()
    return model, [(torch.cat([x, x.new_full((8, 25), -999.0)]), torch.cat([y, y.new_full((8,), -100)])) for x, y in data]


def steps(model, optimizer, batches, captured=False, change=lambda t: None):
    """Steps in a row, as replays of a CUDA graph make them if they are captured."""
    for t, (x, y) in enumerate(batches):
        with capturing() if captured else nullcontext():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        change(t)


def counts(optimizer):
    return [
        {key: value for key, value in state.items() if isinstance(value, int)}
        for state in optimizer.state_dict()["state"].values()
    ]


@pytest.mark.parametrize("renew_every", [1, 3, 5, 7])
@pytest.mark.parametrize("make", [plain, mixed, padded])
def test_replays_make_the_steps_that_would_be_made(make, renew_every):
    model, data = make()
    twin = copy.deepcopy(model)
    optimizer = so.EigenAdam(model, renew_every=renew_every, weight_decay=0.1, capturable=True)
    eager = so.EigenAdam(twin, renew_every=renew_every, weight_decay=0.1)
    warm, replayed = (data * 2)[:6], (data * 6)[6:30]
    steps(model, optimizer, warm)
    steps(twin, eager, warm + replayed)
    steps(model, optimizer, replayed, captured=True)
    assert [state["steps"] for state in optimizer.state.values() if "steps" in state] == [6]  # Python has counted nothing
    # The shares of renewals are rounded elsewhere.
    torch.testing.assert_close(values(model), values(twin), rtol=1e-9, atol=1e-9)
    assert counts(optimizer) == counts(eager)
    assert optimizer.metrics() == pytest.approx(eager.metrics(), rel=1e-6)
    for own, other in ((model, optimizer), (twin, eager)):
        steps(own, other, data)
    torch.testing.assert_close(values(model), values(twin), rtol=1e-9, atol=1e-9)
    steps(model, optimizer, data, captured=True)  # with the numbers of another capture
    steps(twin, eager, data)
    torch.testing.assert_close(values(model), values(twin), rtol=1e-9, atol=1e-9)
    assert counts(copy.deepcopy(optimizer)) == counts(eager)


def test_steps_without_a_capture_are_the_same_to_the_bit():
    models = [network() for _ in range(2)]
    for model, capturable in zip(models, (False, True), strict=True):
        train(model, so.EigenAdam(model, capturable=capturable), range(12))
    assert torch.equal(*map(values, models))


@pytest.mark.parametrize("make", [plain, mixed])
def test_a_captured_step_reads_nothing_on_the_host(make):
    model, data = make()
    data = [[x.float() if x.is_floating_point() else x, y] for x, y in data]
    model.float()
    tensors = [*model.parameters(), *(t for pair in data for t in pair)]
    lr = torch.tensor(1.0)
    with HostReads([*tensors, lr]):
        optimizer = so.EigenAdam(model, lr, capturable=True)
        steps(model, optimizer, (data * 2)[:6])
    with HostReads([*tensors, lr]) as reads:
        steps(model, optimizer, data[:2], captured=True)
    assert not reads.found
    with HostReads(tensors) as reads:
        optimizer.state_dict()
    assert sum(reads.found.values()) == 1


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("make", [plain, mixed])
def test_a_captured_step_moves_nothing_between_devices(make, monkeypatch):
    """On tensors that are a GPU's but have no numbers: to read them, or to mix them with the CPU's, is an error."""
    model, data = make()
    optimizer = so.EigenAdam(model, capturable=True)
    steps(model, optimizer, (data * 2)[:6])
    state, inputs = dict(optimizer.state), {}
    for module in model.modules():
        module.register_forward_hook(lambda own, args, output: inputs.update({own: args[0]}))
    model(data[0][0])
    with FakeTensorMode(), capturing(), torch.no_grad():  # autograd would ask for the device

        def there(t):
            return torch.empty(t.shape, dtype=t.dtype, device="cuda:0")

        fakes = {p: nn.Parameter(there(p)) for p in model.parameters()}
        for module in model.modules():
            module._parameters.update({name: fakes.get(p) for name, p in module._parameters.items()})
        optimizer = so.EigenAdam(model, capturable=True)
        optimizer.param_groups[0]["lr"] = torch.empty((), device="cuda:0")
        for p, own in state.items():
            optimizer.state[fakes[p]] = {key: there(t) if isinstance(t, torch.Tensor) else t for key, t in own.items()}
            fakes[p].grad = there(p)
        optimizer._find_anew()  # knows by the state what is a map
        monkeypatch.setattr(_captures, "has_kernels", lambda device: True)
        # To index a tensor in Python asks for the device, too.
        monkeypatch.setattr(layer_inputs, "_patches", lambda module, x: x.new_empty(9, module.weight.flatten(1).shape[1]))
        seen = torch.ones(1, requires_grad=True)
        for module in {module for matrix in optimizer._matrices for module in matrix.layers}:
            optimizer._observe(module, there(inputs[module]), seen, captured=True)
        optimizer.step()
    assert len(optimizer._replays._weights) == len(optimizer._matrices) > 2


def test_learning_rates_on_the_device_are_followed():
    models = [network() for _ in range(2)]
    for model, capturable in zip(models, (False, True), strict=True):
        bias = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": [p for p in model.parameters() if p.dim() == 2]}, {"params": bias, "lr": 0.5, "weight_decay": 0.2}]
        lr = torch.tensor(1.0, dtype=torch.float64) if capturable else 1.0
        optimizer = so.EigenAdam(groups, lr, model=model, capturable=capturable)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.9**t)
        if capturable:
            optimizer.param_groups[1]["lr"] = torch.tensor(0.5, dtype=torch.float64)
        data = [batch(seed) for seed in range(20)]
        steps(model, optimizer, data[:6], change=lambda t, s=scheduler: s.step())
        steps(model, optimizer, data[6:], captured=capturable, change=lambda t, s=scheduler: s.step())
    torch.testing.assert_close(*map(values, models), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_learning_rate_on_the_device_that_is_no_number_refuses_the_step(bad):
    model, data = plain()
    lr = torch.tensor(1.0)
    optimizer = so.EigenAdam(model, lr, capturable=True, nonfinite="skip")
    steps(model, optimizer, (data * 2)[:6])
    before = values(model)
    lr.fill_(bad)
    steps(model, optimizer, data[:2], captured=True)
    assert torch.equal(values(model), before)
    assert optimizer.skipped_steps == 2
    optimizer = so.EigenAdam(model, lr.fill_(1.0), capturable=True)
    lr.fill_(bad)
    with pytest.raises(so.NonFiniteError, match="or a learning rate that is negative or not finite; no parameter"):
        steps(model, optimizer, data[:1])


@pytest.mark.parametrize("nonfinite", ["error", "skip"])
def test_replays_whose_gradients_are_not_finite_change_nothing_and_are_counted(nonfinite):
    model, data = plain()
    optimizer = so.EigenAdam(model, capturable=True, nonfinite=nonfinite)
    steps(model, optimizer, (data * 2)[:9])
    before = values(model)
    bad = [(x * math.nan, y) for x, y in data[:2]]
    steps(model, optimizer, bad, captured=True)
    assert torch.equal(values(model), before)
    assert optimizer.skipped_steps == 2
    assert optimizer.state_dict()["state"][0]["steps"] == 9
    if nonfinite == "error":
        with pytest.raises(so.NonFiniteError):
            steps(model, optimizer, data[:1])
    steps(model, optimizer, data[:1])
    assert not torch.equal(values(model), before)
    assert optimizer.state_dict()["state"][0]["steps"] == 10 == int(optimizer._shared_state()["control"][STEPS])


def refused(optimizer, model, data, match):
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    with pytest.raises(RuntimeError, match=rf"EigenAdam.step\(\): expected {match}"):
        steps(model, optimizer, data[:1], captured=True)
    torch.testing.assert_close([model.state_dict(), optimizer.state_dict()], before, rtol=0, atol=0)


@pytest.mark.parametrize("before", [0, 4])
def test_the_first_steps_are_made_without_a_capture(before):
    model, data = plain()
    optimizer = so.EigenAdam(model, capturable=True)
    steps(model, optimizer, data[:before])
    refused(optimizer, model, data, f"5 steps, with a renewal of bases, .* got {before} of '0.weight'; call")


def test_a_capture_makes_no_bases():
    model, _ = plain()
    optimizer = so.EigenAdam(model, capturable=True)
    model(batch(0, 9)[0])
    refused(optimizer, model, [batch(1, 300)], "5 steps, with a renewal of bases, .* got 0 of '0.weight'; call")


def test_schedulers_need_a_learning_rate_on_the_device():
    model, data = plain()
    optimizer = so.EigenAdam(model, capturable=True)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    steps(model, optimizer, data)
    refused(optimizer, model, data, r"an lr that is a tensor on the parameters' device where a scheduler.* got 0\.333")


def test_a_learning_rate_on_another_device_is_not_captured(monkeypatch):
    """As after a checkpoint that was loaded to the CPU: replays would repeat its value."""
    model, data = plain()
    optimizer = so.EigenAdam(model, torch.tensor(1.0), capturable=True)
    steps(model, optimizer, data)
    monkeypatch.setattr(so.EigenAdam, "_on_device", lambda self, lr: False)
    refused(optimizer, model, data, "an lr that is a tensor on the parameters' device .* got one on cpu")


def test_a_state_of_another_dtype_is_not_captured():
    """Replays would cast the state of before, and begin with it each time."""
    model, data = plain()
    data = [(x.float(), y) for x, y in data]
    model.float()
    optimizer = so.EigenAdam(model, capturable=True)
    steps(model, optimizer, data)
    model.double()
    data = [(x.double(), y) for x, y in data]
    refused(optimizer, model, data, "the state of '0.weight' in torch.float64 on cpu .* got torch.float32 on cpu; call")
    steps(model, optimizer, data)
    steps(model, optimizer, data, captured=True)
    assert counts(optimizer)[0]["steps"] == 15


def test_a_step_of_several_ranks_is_not_captured(monkeypatch):
    model, data = plain()
    optimizer = so.EigenAdam(model, capturable=True)
    steps(model, optimizer, data)
    with monkeypatch.context() as patch:
        patch.setattr(so.EigenAdam, "_is_distributed", True)
        with capturing(), pytest.raises(RuntimeError, match="expected no capture of a CUDA graph where several ranks train"):
            F.cross_entropy(model(data[0][0]), data[0][1]).backward()
            optimizer.step()
    steps(model, optimizer, data[:1])


def test_plain_pytorch_is_not_captured(monkeypatch):
    model, data = plain()
    optimizer = so.EigenAdam(model, capturable=True)
    steps(model, optimizer, data)
    monkeypatch.setattr(_captures, "has_kernels", lambda device: False)
    with monkeypatch.context() as patch:
        patch.setattr(so.ops, "eigen_sketch_", None)  # nor called in the forward pass
        refused(optimizer, model, data, "kernels for CUDA where a CUDA graph captures the step, got plain PyTorch")


def test_the_forward_pass_is_captured_with_the_step():
    model, data = plain()
    optimizer = so.EigenAdam(model, capturable=True)
    steps(model, optimizer, data)
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    with capturing(), pytest.raises(RuntimeError, match=r"to have the forward pass, too, got no inputs of '0.weight'"):
        optimizer.step()


def test_what_a_graph_has_of_inputs_is_not_for_other_steps():
    """The memory of a pass that was captured has no numbers before it is replayed, and then the last replay's."""
    models = [network() for _ in range(2)]
    for model, captured in zip(models, (False, True), strict=True):
        optimizer = so.EigenAdam(model, capturable=True)
        train(model, optimizer, range(6))
        if captured:
            with capturing():
                model(batch(20)[0] * 7)
        train(model, optimizer, range(6, 12))
    assert torch.equal(*map(values, models))


def test_inputs_seen_before_replays_are_not_for_the_bases_that_these_have_made():
    models, data = [network() for _ in range(2)], [batch(seed) for seed in range(5)]
    for model, passes in zip(models, (True, False), strict=True):
        optimizer = so.EigenAdam(model, capturable=True)
        steps(model, optimizer, data)
        steps(model, optimizer, data, captured=True)
        if passes:
            model(data[0][0] * 7)  # of which nobody takes a gradient
        optimizer._shared_state()["control"][STEPS] += 5  # by replays, which call nothing in Python
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optimizer, "_observe", lambda *_: None)
            steps(model, optimizer, data[:1])
        assert optimizer.state[model[0].weight]["unseen"] == 1
    assert torch.equal(*map(values, models))


def test_a_layer_that_shows_inputs_again_in_a_capture_is_seen():
    model, data = plain()
    optimizer = so.EigenAdam(model, capturable=True)
    steps(model, optimizer, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "_observe", lambda *_: None)
        steps(model, optimizer, data[:1])
    assert optimizer.metrics()["seen"] == 0
    steps(model, optimizer, data * 2, captured=True)
    assert optimizer.metrics()["seen"] == 1
    assert {state["unseen"] for state in optimizer.state_dict()["state"].values() if "unseen" in state} == {0}


def test_other_parameters_than_the_captured_ones_are_refused():
    model, data = plain()
    optimizer = so.EigenAdam(model, capturable=True)
    steps(model, optimizer, data)
    steps(model, optimizer, data[:3], captured=True)
    model[0].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    match = "gradients of the parameters that the step captured in a CUDA graph has"
    refused(optimizer, model, data, match)
    with pytest.raises(RuntimeError, match=match):
        steps(model, optimizer, data[:1])
    optimizer.load_state_dict(optimizer.state_dict())
    steps(model, optimizer, data)
    steps(model, optimizer, data, captured=True)
    assert counts(optimizer)[0]["steps"] == 18


def test_places_that_a_graph_computes_are_not_kept():
    layer_inputs._KEPT.clear()
    layer_inputs._READ_BY_GRAPHS.clear()
    conv, x = nn.Conv2d(2, 3, 3), torch.randn(2, 2, 6, 7)
    with capturing():
        rows = layer_inputs.input_rows(conv, x)
    assert not layer_inputs._KEPT
    assert torch.equal(layer_inputs.input_rows(conv, x), rows)
    with capturing():
        assert torch.equal(layer_inputs.input_rows(conv, x), rows)
    assert len(layer_inputs._KEPT) == 1
    read = next(iter(layer_inputs._KEPT.values()))
    for size in range(7, 60):
        layer_inputs.input_rows(conv, torch.randn(1, 2, size, 6))
    assert len(layer_inputs._KEPT) == 32
    assert not any(each is read for each in layer_inputs._KEPT.values())
    assert {read} == layer_inputs._READ_BY_GRAPHS  # a graph goes on to read it


def test_a_bias_hessian_is_not_captured():
    with pytest.raises(ValueError, match="expected capturable False with a bias Hessian's bases, got True"):
        so.EigenAdam(network(), curvature="pch-abs", criterion=nn.CrossEntropyLoss(), capturable=True)


class Late:
    """A report that arrives once `arrived` says so."""

    arrived = False

    def __init__(self, t):
        self._copy = t.clone()

    @property
    def here(self):
        return Late.arrived

    def read(self):
        return self._copy


@pytest.mark.parametrize("ahead", [1, 4])
@pytest.mark.parametrize("bad", [0, 1, 5, 7])
def test_a_refused_step_whose_report_comes_late_leaves_no_trace(bad, ahead, monkeypatch):
    """Steps in a row with one that is refused, of which the host learns `ahead` steps later, as on CUDA."""
    monkeypatch.setattr("secondorder.optim._eigen.reports.Arriving", Late)
    model, data = mixed()
    twin = copy.deepcopy(model)
    optimizer, eager = so.EigenAdam(model, nonfinite="skip"), so.EigenAdam(twin, nonfinite="skip")
    monkeypatch.setattr(optimizer, "_is_reported", lambda control: True)
    for t in range(12):
        for own, other in ((model, optimizer), (twin, eager)):
            other.zero_grad()
            x, y = data[t % 5]
            F.cross_entropy(own(x), y).backward()
            if t == bad:
                own.head.weight.grad[0, 0] = math.nan
            if t % 3 == 0:
                own.norm.weight.grad = None  # it makes no step
            Late.arrived = t >= bad + ahead
            other.step()
    Late.arrived = True
    optimizer._read_reports()
    assert optimizer.skipped_steps == eager.skipped_steps == 1
    assert [state["step"] for state in counts(optimizer)] == [state["step"] for state in counts(eager)]
    assert optimizer._shared_state()["steps"] == eager._shared_state()["steps"] == 11
    assert values(model).isfinite().all()
    if ahead == 1 and bad != 5:  # else renewals are due at other steps, by what the host counts until then
        assert counts(optimizer) == counts(eager)
        torch.testing.assert_close(values(model), values(twin))


def test_reports_that_do_not_arrive_in_time_are_kept(monkeypatch):
    monkeypatch.setattr("secondorder.optim._eigen.reports.Arriving", Late)
    model, data = plain()
    optimizer = so.EigenAdam(model)
    monkeypatch.setattr(optimizer, "_is_reported", lambda control: True)
    Late.arrived = False
    for t, (x, y) in enumerate(data):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if t == 1:
            model[0].weight.grad[0, 0] = math.nan
        optimizer.step()
    for report in list(optimizer._reports._under_way)[:2]:
        report.control.__class__ = type("Here", (Late,), {"here": True})
    with pytest.raises(so.NonFiniteError, match="expected finite gradients"):
        optimizer.step()
    assert len(optimizer._reports) == 3


@pytest.mark.parametrize("how", ["load", "copy"])
@pytest.mark.parametrize("bad", [[3], [2, 3], [0]])
def test_states_are_saved_and_copied_once_it_is_known_which_steps_were_made(how, bad, monkeypatch):
    monkeypatch.setattr("secondorder.optim._eigen.reports.Arriving", Late)
    Late.arrived = False
    model, data = plain()
    optimizer = so.EigenAdam(model, nonfinite="skip")
    monkeypatch.setattr(optimizer, "_is_reported", lambda control: True)
    for t, (x, y) in enumerate(data):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if t in bad:
            model[0].weight.grad[0, 0] = math.nan
        optimizer.step()
    if how == "copy":
        _, other = copy.deepcopy((model, optimizer))
    else:
        other = so.EigenAdam(copy.deepcopy(model))
        other.load_state_dict(optimizer.state_dict())
    made = len(data) - len(bad)
    for own in (optimizer, other):
        shared = own._shared_state()
        assert (shared["steps"], shared["refused"], int(shared["control"][4])) == (made, len(bad), made)
        assert {state["step"] for state in own.state.values()} == {made}


def test_what_a_refused_step_has_seen_stays(monkeypatch):
    """The mean of the inputs and a table's share are facts of the forward pass, which later steps have used."""
    monkeypatch.setattr("secondorder.optim._eigen.reports.Arriving", Late)
    Late.arrived = False
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(1000, 8), nn.Linear(8, 3))
    optimizer = so.EigenAdam(model, nonfinite="skip")
    monkeypatch.setattr(optimizer, "_is_reported", lambda control: True)
    for t in range(8):
        optimizer.zero_grad()
        model(torch.randint(1000, (20,))).square().mean().backward()
        if t == 0:
            model[1].weight.grad[0, 0] = math.nan
        optimizer.step()
    before = optimizer.state[model[1].weight]["mean"].clone()
    optimizer.state_dict()
    assert optimizer.state[model[0].weight]["share"] == 0.2
    assert torch.equal(optimizer.state[model[1].weight]["mean"], before)


def test_a_refused_step_that_a_checkpoint_waited_for_is_told_of_by_the_next_one(monkeypatch):
    monkeypatch.setattr("secondorder.optim._eigen.reports.Arriving", Late)
    Late.arrived = False
    model, data = plain()
    optimizer = so.EigenAdam(model)
    monkeypatch.setattr(optimizer, "_is_reported", lambda control: True)

    def step(factor=1.0):
        optimizer.zero_grad()
        (factor * F.cross_entropy(model(data[0][0]), data[0][1])).backward()
        optimizer.step()

    step()
    step(math.inf)
    optimizer.state_dict()
    with pytest.raises(so.NonFiniteError, match="expected finite gradients"):
        step()
    step()


def test_reports_are_read_with_a_lag_of_their_own_where_ranks_must_count_alike(monkeypatch):
    monkeypatch.setattr("secondorder.optim._eigen.reports.Arriving", Late)
    model, _ = plain()
    optimizer = so.EigenAdam(model, nonfinite="skip")
    shared, reports = optimizer._shared_state(), optimizer._reports
    shared["steps"] = 3
    for refused in (0, 1, 2):
        control = shared["control"].clone()
        control[5] = refused
        reports.add(control, [], renewed=False)
    for Late.arrived in (False, True):
        reports.settle(shared, optimizer.state, newest=1)
        assert (len(reports), shared["refused"], shared["steps"]) == (1, 1, 2)
    assert reports.tell() and not reports.tell()
