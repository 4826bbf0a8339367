"""Lightning: automatic and manual optimization are a plain loop, and what its Trainer adds does what it says."""

import pytest
import torch
from helpers.frameworks import (
    CLOSED,
    STEPPED,
    assert_one_process,
    criterion_for,
    dataset,
    imported,
    in_two_processes,
    loader,
    network,
    of_few_directions,
    plain_loop,
    quiet,
    values,
)  # fmt: skip
from torch import nn

import secondorder as so

pl = imported("pytorch_lightning")
pytestmark = quiet

MAKE = {**STEPPED, **CLOSED}


class Lit(pl.LightningModule):
    """As one writes it for Adam, but for the line of configure_optimizers."""

    def __init__(self, name, manual=False, dtype=torch.float32, scheduled=None):
        super().__init__()
        self.net, self.criterion = network(dtype), criterion_for(name)
        self.name, self.scheduled = name, scheduled
        self.automatic_optimization = not manual

    def configure_optimizers(self):
        optimizer = MAKE[self.name](self.net, self.criterion)
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


@pytest.mark.parametrize("name", STEPPED)
def test_accumulation_schedule_and_bf16_mixed_resume_together(name, tmp_path):
    def module():
        return Lit(name, scheduled=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20))

    options, (whole, first, second) = {"accumulate_grad_batches": 2, "precision": "bf16-mixed"}, (module() for _ in range(3))
    trainer(3, **options).fit(whole, loader(16))
    begun = trainer(1, **options)
    begun.fit(first, loader(16))
    begun.save_checkpoint(tmp_path / "run.ckpt")
    trainer(3, **options).fit(second, loader(16), ckpt_path=tmp_path / "run.ckpt")
    assert torch.equal(values(second), values(whole))


def test_clipping_under_bf16_mixed_is_the_modules_own():
    """Lightning refuses it for optimizers that unscale gradients themselves, though bfloat16 has no scale."""

    class Clipping(Lit):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            clip(self)

    def clip(net):
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)

    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        trainer(precision="bf16-mixed", gradient_clip_val=0.1).fit(Lit("LayerwiseNewton"), loader())
    module = Clipping("LayerwiseNewton")
    trainer(precision="bf16-mixed").fit(module, loader())
    assert torch.equal(values(module), values(plain_loop("LayerwiseNewton", autocast=True, between=clip)))


class Two(Lit):
    """A body and a head with an optimizer each, by manual optimization."""

    def __init__(self):
        super().__init__("EigenAdam", manual=True)
        self.losses = []

    def configure_optimizers(self):
        return so.EigenAdam(self.net[0]), so.LayerwiseNewton(self.net[2], self.criterion)

    def training_step(self, batch, index):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        self.losses.append(float(loss.detach()))


def test_two_optimizers():
    module = Two()
    trainer(6).fit(module, loader())
    assert module.losses[-1] < 0.3 * module.losses[0]


class Ranked(Lit):
    """Each rank has its rows of every batch. Where configure_optimizers is called the Trainer has wrapped the module."""

    def train_dataloader(self):
        rows = slice(16 * self.global_rank, 16 * (self.global_rank + 1))
        batches = [(x[rows], y[rows]) for x, y in loader(32, torch.float64)]
        return torch.utils.data.DataLoader(batches, batch_size=None)

    def configure_optimizers(self):
        return of_few_directions(self.name, self if self.name == "EigenAdam" else self.trainer.model, self.criterion)


def trained_as_a_rank():
    """Parameters of two epochs, by the optimizer's name."""
    found = {}
    for name in ("EigenAdam", "EACG", "LayerwiseNewton"):
        module = Ranked(name, dtype=torch.float64)
        trainer(devices=2, strategy="ddp", precision="64-true", use_distributed_sampler=False).fit(module)
        found[name] = values(module)
    return found


def test_several_processes_are_one_with_all_batches(tmp_path):
    assert_one_process(in_two_processes(trained_as_a_rank, tmp_path))


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
