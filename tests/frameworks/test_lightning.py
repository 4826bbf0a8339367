"""Lightning: automatic and manual optimization are a plain loop, and what its Trainer adds does what it says."""

import pytest
import torch
from helpers.frameworks import CLOSED, STEPPED, criterion_for, dataset, imported, loader, network, plain_loop, quiet, values
from torch import nn

import secondorder as so

pl = imported("pytorch_lightning")
pytestmark = quiet


class Lit(pl.LightningModule):
    """As one writes it for Adam, but for the line of configure_optimizers."""

    def __init__(self, name, manual=False, dtype=torch.float32, scheduled=None):
        super().__init__()
        self.net, self.criterion = network(dtype), criterion_for(name)
        self.make, self.scheduled = {**STEPPED, **CLOSED}[name], scheduled
        self.automatic_optimization = not manual

    def configure_optimizers(self):
        optimizer = self.make(self.net, self.criterion)
        if self.scheduled is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduled(optimizer), "interval": "step"}}

    def loss(self, batch):
        return self.criterion(self.net(batch[0]), batch[1])

    def training_step(self, batch, index):
        if self.automatic_optimization:
            return self.loss(batch)
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)
        return None


def trainer(epochs=2, **options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(max_epochs=epochs, accelerator="cpu", **{**quiet, **options})


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("name", [*STEPPED, *CLOSED])
def test_fit_is_a_plain_loop(name, manual):
    module = Lit(name, manual)
    trainer().fit(module, loader())
    assert torch.equal(values(module), values(plain_loop(name)))


@pytest.mark.parametrize("name", STEPPED)
def test_accumulated_batches_are_their_union(name):
    module = Lit(name, dtype=torch.float64)
    trainer(accumulate_grad_batches=2, precision="64-true").fit(module, loader(16, torch.float64))
    torch.testing.assert_close(values(module), values(plain_loop(name, dtype=torch.float64)), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CLOSED)
def test_accumulation_outside_of_a_closure_is_refused(name):
    module = Lit(name)
    with pytest.raises(RuntimeError, match="accumulate_grad_batches=1 in Lightning"):
        trainer(accumulate_grad_batches=2).fit(module, loader(16))
    assert torch.equal(values(module), values(network()))


@pytest.mark.parametrize("name", [*STEPPED, "KBFGS"])
def test_gradients_are_clipped(name):
    def clip(net):
        gradients = [p for p in net.parameters() if p.grad is not None]
        if gradients:  # not so in the second call of K-BFGS
            nn.utils.clip_grad_norm_(gradients, 0.1)

    module = Lit(name)
    trainer(gradient_clip_val=0.1).fit(module, loader())
    torch.testing.assert_close(values(module), values(plain_loop(name, between=clip)))
    if name in ("LayerwiseNewton", "KBFGS"):  # EigenAdam's steps know no scale, and EACG's are shorter than max_step here
        assert not torch.allclose(values(module), values(plain_loop(name)), rtol=1e-3)


@pytest.mark.parametrize("name", [*STEPPED, "KBFGS"])
def test_bf16_mixed_is_autocast(name):
    module = Lit(name)
    trainer(precision="bf16-mixed").fit(module, loader())
    assert torch.equal(values(module), values(plain_loop(name, autocast=True)))
    assert not torch.equal(values(module), values(plain_loop(name)))


def test_autocast_is_refused_where_steps_are_to_be_exact():
    module = Lit("LevenbergMarquardt")
    with pytest.raises(RuntimeError, match=r"in the parameters' dtype, torch.float32, got torch.bfloat16 .* torch.autocast"):
        trainer(precision="bf16-mixed").fit(module, loader())


@pytest.mark.parametrize("name", [*STEPPED, "KBFGS"])
def test_schedulers_step_with_the_trainer(name):
    def scheduled(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], total_steps=6, cycle_momentum=False)

    module = Lit(name, scheduled=scheduled)
    trainer().fit(module, loader())
    assert torch.equal(values(module), values(plain_loop(name, scheduled=scheduled)))


@pytest.mark.parametrize("name", [*STEPPED, *CLOSED])
def test_a_run_from_a_checkpoint_is_the_uninterrupted_one(name, tmp_path):
    whole, first, second = Lit(name), Lit(name), Lit(name)
    trainer(3).fit(whole, loader())
    begun = trainer(1)
    begun.fit(first, loader())
    begun.save_checkpoint(tmp_path / "run.ckpt")
    trainer(3).fit(second, loader(), ckpt_path=tmp_path / "run.ckpt")
    assert torch.equal(values(second), values(whole))


def test_metrics_are_logged(tmp_path):
    class Logged(Lit):
        def training_step(self, batch, index):
            self.log_dict(self.optimizers().metrics())
            return super().training_step(batch, index)

    module = Logged("EigenAdam")
    fitted = trainer()
    fitted.fit(module, loader())
    assert fitted.logged_metrics["length"] > 0
    assert fitted.logged_metrics["coverage"] == 1


def test_the_parameters_alone_will_do():
    class Parameters(Lit):
        def configure_optimizers(self):
            return so.EigenAdam(self.parameters())

    module = Parameters("EigenAdam")
    x, y = dataset().tensors
    before = float(module.loss((x, y)))
    trainer(6).fit(module, loader())
    assert float(module.loss((x, y))) < before - 0.05
