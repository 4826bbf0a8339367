"""Every everyday script is built, takes three steps and is evaluated."""

import math

import pytest
import torch

from bench.experiments import at_defaults
from bench.experiments.eigen_adam import PAPERS
from bench.experiments.everyday import SCRIPTS
from bench.experiments.everyday.fields import exact
from bench.experiments.everyday.games import LONGEST, mean_return
from bench.experiments.everyday.images import view
from bench.experiments.harness import Method, Store
from bench.experiments.training import study


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_takes_steps_and_is_evaluated(script):
    torch.manual_seed(0)
    task = script.begin(None, 0)
    first = task.evaluate()
    assert all(map(math.isfinite, first))
    assert task.evaluate() == first  # whatever is random in it is the same
    optimizer = torch.optim.Adam(task.model.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        task.loss(next(task.batches)).backward()
        assert all(p.grad is not None for p in task.model.parameters())
        optimizer.step()
    after = task.evaluate()
    assert all(map(math.isfinite, after))
    assert after != first or script.noise
    assert script.signed or after[0] >= 0
    assert task.model.training
    assert task.steps_per_epoch >= 1


def test_names_are_keys_of_the_stored_runs():
    names = [problem.name for problem in (*PAPERS, *SCRIPTS)]
    assert len(set(names)) == len(names)
    assert [script.name for script in SCRIPTS if script.noise] == ["DQN"]


def test_the_heat_equation_is_solved_by_what_is_taken_as_its_solution():
    points = torch.rand(9, 2, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(exact(points).sum(), points, create_graph=True)
    (bend,) = torch.autograd.grad(slope[:, 1].sum(), points)
    torch.testing.assert_close(math.pi**2 * slope[:, 0], bend[:, 1])
    edge = torch.tensor([[0.3, 0.0], [0.7, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(exact(edge), torch.zeros(2, 1, dtype=torch.float64))


def test_views_are_the_image_shifted():
    x = torch.zeros(50, 1, 8, 8)
    x[:, :, 4, 4] = 100
    rows, columns = (view(x).flatten(2).argmax(2) // 8, view(x).flatten(2).argmax(2) % 8)
    assert set(rows.flatten().tolist()) == set(columns.flatten().tolist()) == {3, 4, 5}


def test_a_pole_stays_up_for_who_pushes_against_its_fall():
    leaning = torch.nn.Linear(4, 2)
    with torch.no_grad():
        leaning.weight.copy_(torch.tensor([[0.0] * 4, [0.0, 0.5, 10.0, 1.0]]))
        leaning.bias.zero_()
    assert mean_return(leaning) == LONGEST
    with torch.no_grad():
        leaning.weight.neg_()
    assert mean_return(leaning) < 20


@pytest.mark.parametrize("method", at_defaults.COMPARISONS["everyday-papers"].optimizers, ids=lambda method: method.name)
def test_the_papers_methods_take_steps_or_their_refusal_is_kept(method, tmp_path):
    """On a loss with a term beside its criterion, and where there is no linear layer, which has a reason."""
    chosen = [script for script in SCRIPTS if script.name in ("mixture of experts", "matrix factorization")]
    runs = study(chosen, [method], [0], Store(tmp_path / "runs.jsonl"), None, share=0.05)
    by_script = {run.problem: run for run in runs}
    assert by_script["mixture of experts"].steps[-1] > 0
    assert not by_script["mixture of experts"].diverged
    assert "at least one trainable nn.Linear" in by_script["matrix factorization"].diverged


def test_optimizers_at_their_defaults_against_adam(tmp_path, monkeypatch):
    """What cannot run has its reason below the tables, and is in no mean."""

    def refusing(model, criterion):
        raise ValueError("not this one")

    chosen = [script for script in SCRIPTS if script.name in ("diamonds", "quantiles")]
    methods = [at_defaults.EIGEN, Method("Refusing", refusing, guest=True)]
    monkeypatch.setitem(at_defaults.COMPARISONS, "few", at_defaults.Comparison("few", chosen, methods))
    text = at_defaults.compare("few", tmp_path, None, [0], share=0.03)
    means = text.splitlines()
    assert means[2].startswith("| EigenAdam | 2 of 2 | ")
    assert means[2].endswith(" | - |")
    assert means[3] == "| Refusing | 0 of 2 | 0 of 0 | nan | 0 of 0 | nan | nan,  | 0 of 0 | diamonds, quantiles |"
    assert "- Refusing, diamonds; quantiles: not this one" in text
    before = (tmp_path / "few.jsonl").read_text()
    assert at_defaults.compare("few", tmp_path, None, [0], share=0.03) == text
    assert (tmp_path / "few.jsonl").read_text() == before
