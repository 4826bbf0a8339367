"""torch's own utilities around an optimizer: averaged models, SWALR, TensorBoard."""

import contextlib

import pytest
import torch
from helpers.frameworks import STEPPED, criterion_for, imported, loader, network, quiet, values
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import secondorder as so

pytestmark = quiet


def epoch(net, optimizer, criterion, after=lambda: None):
    for x, y in loader():
        optimizer.zero_grad()
        criterion(net(x), y).backward()
        optimizer.step()
        after()


@pytest.mark.parametrize("name", STEPPED)
def test_averaged_models_and_swalr(name):
    net, criterion = network(), criterion_for(name)
    optimizer = STEPPED[name](net, criterion)
    averaged = AveragedModel(net)
    scheduler = SWALR(optimizer, swa_lr=0.5 * optimizer.defaults["lr"], anneal_epochs=2)
    seen = []
    for _ in range(3):
        epoch(net, optimizer, criterion)
        scheduler.step()
        averaged.update_parameters(net)
        seen.append(values(net))
    torch.testing.assert_close(values(averaged), torch.stack(seen).mean(0))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * optimizer.defaults["lr"])
    # The average is a net of its own: calling it leaves the optimizer's records alone.
    before = optimizer.metrics()
    criterion(averaged(next(iter(loader()))[0]), next(iter(loader()))[1]).backward()
    assert optimizer.metrics() == before
    epoch(net, optimizer, criterion)


def test_an_average_after_every_step_changes_no_step():
    nets = [network(), network()]
    averaged = AveragedModel(nets[1], multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for net, after in zip(nets, (lambda: None, lambda: averaged.update_parameters(nets[1])), strict=True):
        epoch(net, so.EigenAdam(net), nn.CrossEntropyLoss(), after)
    assert torch.equal(values(nets[0]), values(nets[1]))


@pytest.mark.parametrize("name", ["EigenAdam", "EACG"])
def test_update_bn_leaves_the_optimizer_alone(name):
    torch.manual_seed(1)
    net, criterion = nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 3)), nn.CrossEntropyLoss()
    with pytest.warns() if name == "EACG" else contextlib.nullcontext():  # of the layer before the norm
        optimizer = STEPPED[name](net, criterion)
        epoch(net, optimizer, criterion)
    averaged = AveragedModel(net)
    before, kept = optimizer.metrics(), values(net)
    update_bn(loader(), averaged)
    update_bn(loader(), net)
    assert optimizer.metrics() == before
    assert torch.equal(values(net), kept)
    epoch(net, optimizer, criterion)


def test_metrics_in_tensorboard(tmp_path):
    tensorboard = imported("torch.utils.tensorboard")
    readers = imported("tensorboard.backend.event_processing.event_accumulator")
    net, criterion = network(), nn.CrossEntropyLoss()
    optimizer = so.EigenAdam(net)
    written = []
    with tensorboard.SummaryWriter(tmp_path) as writer:

        def write():
            written.append(optimizer.metrics())
            for name, value in written[-1].items():
                writer.add_scalar(f"optimizer/{name}", value, len(written))

        epoch(net, optimizer, criterion, write)
    events = readers.EventAccumulator(str(tmp_path))
    events.Reload()
    for name in written[0]:
        found = [event.value for event in events.Scalars(f"optimizer/{name}")]
        assert found == pytest.approx([metrics[name] for metrics in written], rel=1e-6)
