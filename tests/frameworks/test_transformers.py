"""Hugging Face's Trainer: the optimizer by a keyword, its groups, schedules, clipping, checkpoints, and losses by a criterion."""

import inspect

import pytest
import torch
from helpers.frameworks import imported, quiet, values
from torch import nn

import secondorder as so

imported("accelerate")
transformers = imported("transformers")
# A transformer's sums and embeddings have no recursion, and say so.
pytestmark = pytest.mark.filterwarnings(*quiet.args, "ignore:secondorder. (the output of layer|no curvature covers)")

IDS = torch.randint(50, (48, 8), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": ids, "labels": ids[0] % 3} for ids in IDS]


def encoder():
    """A transformer with a classifier, as small as they get."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=8, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def arguments(folder, **options):
    """Eight steps in the same order of rows."""
    return transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=16, logging_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, seed=0, data_seed=0, **{"max_steps": 8, "save_strategy": "no", **options},
    )  # fmt: skip


def trained(folder, model, optimizer, resume=None, options=None, **keywords):
    trainer = transformers.Trainer(
        model, arguments(folder, **(options or {})), train_dataset=ROWS, optimizers=(optimizer, None), **keywords
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def fallen(trainer):
    losses = logged(trainer, "loss")
    return sum(losses[-3:]) < sum(losses[:3])


def test_the_optimizer_is_given_and_the_trainer_makes_the_schedule(tmp_path):
    model = encoder()
    trainer = trained(tmp_path, model, so.EigenAdam(model))
    assert fallen(trainer)
    # The default schedule falls from the optimizer's own lr to zero.
    assert logged(trainer, "learning_rate") == pytest.approx([1 - k / 8 for k in range(8)])
    assert model.classifier.weight in {matrix.weight for matrix in trainer.optimizer.optimizer._matrices if matrix.layers}


def test_groups_with_and_without_decay(tmp_path):
    """The groups are the Trainer's own: no weight decay for biases and norms."""

    class Decaying(transformers.Trainer):
        def create_optimizer(self, model=None):
            decay = self.get_decay_parameter_names(self.model)
            named = list(self.model.named_parameters())
            groups = [
                {"params": [p for n, p in named if n in decay], "weight_decay": self.args.weight_decay},
                {"params": [p for n, p in named if n not in decay], "weight_decay": 0.0},
            ]
            self.optimizer = so.EigenAdam(groups, model=self.model)
            return self.optimizer

    model = encoder()
    trainer = Decaying(model, arguments(tmp_path, weight_decay=0.1), train_dataset=ROWS)
    trainer.train()
    groups = trainer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.ndim == 2 for p in groups[0]["params"])
    assert any(p is model.classifier.bias for p in groups[1]["params"])
    assert trainer.optimizer.optimizer.metrics()["seen"] == 1  # behind the wrapper of accelerate


def test_the_class_alone(tmp_path):
    model = encoder()
    trainer = transformers.Trainer(
        model, arguments(tmp_path, weight_decay=0.1), train_dataset=ROWS, optimizer_cls_and_kwargs=(so.EigenAdam, {})
    )
    trainer.train()
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]
    assert fallen(trainer)


def test_the_class_with_the_model(tmp_path):
    """The Trainer gives a keyword `model` in place of its groups."""
    criterion, model = nn.CrossEntropyLoss(), encoder()
    trainer = transformers.Trainer(
        model, arguments(tmp_path), train_dataset=ROWS, optimizer_cls_and_kwargs=(so.EigenAdam, {"model": model})
    )
    trainer.train()
    assert trainer.optimizer.optimizer.metrics()["seen"] == 1
    same = encoder()
    trained(tmp_path, same, so.EigenAdam(same))
    assert torch.equal(values(model), values(same))

    model = encoder()
    trainer = transformers.Trainer(
        model, arguments(tmp_path), train_dataset=ROWS,
        optimizer_cls_and_kwargs=(so.EACG, {"model": model, "criterion": criterion}),
        compute_loss_func=lambda output, labels, **_: criterion(output.logits, labels),
    )  # fmt: skip
    trainer.train()
    assert fallen(trainer)
    assert trainer.optimizer.optimizer.metrics()["trace"] > 0


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, {"bf16": True}, {"max_grad_norm": 0.01}], ids=str)
def test_options_of_the_trainer(options, tmp_path):
    model = encoder()
    trainer = trained(tmp_path, model, so.EigenAdam(model), options=options)
    assert fallen(trainer)


@pytest.mark.parametrize("name", ["EigenAdam", "EACG"])
def test_a_run_from_a_checkpoint_is_the_uninterrupted_one(name, tmp_path):
    def run(**keywords):
        model = encoder()
        optimizer = so.EigenAdam(model) if name == "EigenAdam" else so.EACG(model, criterion)
        trained(tmp_path, model, optimizer, **keywords)
        return model

    criterion = nn.CrossEntropyLoss()
    own = {} if name == "EigenAdam" else {"compute_loss_func": lambda output, labels, **_: criterion(output.logits, labels)}
    whole = run(options={"save_strategy": "steps", "save_steps": 4}, **own)
    second = run(resume=str(tmp_path / "checkpoint-4"), **own)
    assert torch.equal(values(second), values(whole))


def test_a_loss_by_the_optimizers_criterion(tmp_path):
    criterion, model = nn.CrossEntropyLoss(), encoder()
    optimizer = so.EACG(model, criterion)
    trainer = trained(tmp_path, model, optimizer, compute_loss_func=lambda output, labels, **_: criterion(output.logits, labels))
    assert fallen(trainer)
    assert optimizer.metrics()["trace"] > 0


def test_a_loss_that_the_model_computes_is_refused_with_what_to_do(tmp_path):
    model = encoder()
    with pytest.raises(RuntimeError, match="no call of the criterion that leads to them was recorded: .*. Compute the loss by"):
        trained(tmp_path, model, so.EACG(model, nn.CrossEntropyLoss()))


def test_the_signature_of_forward_stays():
    """The Trainer drops the columns that forward does not take."""
    model = encoder()
    before = inspect.signature(model.forward)
    assert "input_ids" in before.parameters
    optimizer = so.EACG(model, nn.CrossEntropyLoss())
    assert inspect.signature(model.forward) == before
    optimizer.remove_hooks()
    assert inspect.signature(model.forward) == before


def test_steps_with_closures_are_refused_with_what_to_do(tmp_path):
    model = encoder()
    with pytest.raises(RuntimeError, match=r"KBFGS.step\(\): expected a closure"):
        trained(tmp_path, model, so.KBFGS(model, nn.CrossEntropyLoss()))
