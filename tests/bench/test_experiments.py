"""The harness of the experiments on a problem of a second."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import secondorder as so
from bench.data import Dataset
from bench.experiments import scales
from bench.experiments.__main__ import ROOT, Name, insert
from bench.experiments.harness import Method, Run, Store, Supervised, best_runs, grid, matrices, table
from bench.experiments.problems import MIXTURE, JetNet, PoissonLoss
from bench.experiments.studies import STUDIES
from bench.experiments.training import study


def line(_):
    x = torch.linspace(-1, 1, 40).reshape(20, 2)
    return Dataset("a line", x, x.sum(1, keepdim=True), x, x.sum(1, keepdim=True))


PROBLEM = Supervised(
    "line", "2-1", line, lambda: nn.Linear(2, 1), nn.MSELoss, batch=8, seconds=0.02,
    score=lambda output, target: (output - target).abs().max().item(), score_name="error",
)  # fmt: skip
SGD = Method("SGD", lambda model, _, lr: torch.optim.SGD(model.parameters(), lr), grid(lr=[1e-6, 0.1]))
EACG = Method("EACG", lambda model, criterion: so.LayerwiseNewton(model, criterion))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "runs.jsonl")


def test_a_study_tunes_on_the_first_seed_and_trains_the_best_setting_with_the_others(store):
    runs = study([PROBLEM], [SGD, EACG], [0, 1, 2], store, None)
    assert [(run.method, run.setting, run.seed) for run in runs] == [
        ("SGD", {"lr": 1e-6}, 0), ("SGD", {"lr": 0.1}, 0), ("EACG", {}, 0),
        ("SGD", {"lr": 0.1}, 1), ("EACG", {}, 1), ("SGD", {"lr": 0.1}, 2), ("EACG", {}, 2),
    ]  # fmt: skip
    for run in runs:
        assert not run.diverged
        assert run.method == "EACG" or run.loss[-1] <= run.loss[0]
        assert run.seconds[0] == 0 and run.seconds[-1] >= 0.02
        assert run.epochs[-1] == pytest.approx(run.steps[-1] * 8 / 20)
        assert len(run.loss) == len(run.score) == len(run.steps) == len(run.seconds)
    chosen = best_runs(runs)["line"]
    assert [run.seed for run in chosen["SGD"]] == [0, 1, 2]
    assert {run.setting["lr"] for run in chosen["SGD"]} == {0.1}
    text = table(PROBLEM, chosen)
    assert "| SGD | lr 0.1 |" in text
    assert "| EACG | defaults |" in text


def test_a_pilot_chooses_settings_for_all_seeds(store):
    runs = study([PROBLEM], [SGD, EACG], [0, 1], store, None, share=2, pilot=0.25)
    assert [(run.method, run.setting, run.seed) for run in runs] == [
        ("SGD", {"lr": 0.1}, 0), ("EACG", {}, 0), ("SGD", {"lr": 0.1}, 1), ("EACG", {}, 1),
    ]  # fmt: skip
    assert {run.budget for run in runs} == {0.04}
    assert [(run.method, run.setting["lr"]) for run in store.runs() if run.budget == 0.01] == [("SGD", 1e-6), ("SGD", 0.1)]


def test_a_study_goes_on_where_it_was_interrupted(store):
    study([PROBLEM], [SGD], [0], store, None)
    first = store.path.read_text()
    study([PROBLEM], [SGD, EACG], [0], store, None)
    assert store.path.read_text().startswith(first)
    assert len(store.runs()) == 3
    store.forget(lambda run: run.method == "SGD")
    assert [run.method for run in store.runs()] == ["EACG"]


def test_a_run_that_diverges_is_recorded_as_such(store):
    wild = Method("wild", lambda model, _: torch.optim.SGD(model.parameters(), 1e20))
    (run,) = study([PROBLEM], [wild], [0], store, None)
    assert "training loss is" in run.diverged
    assert run.final == math.inf
    assert json.loads(store.path.read_text())["diverged"]
    assert "diverged" in table(PROBLEM, {"wild": [run]})


def test_a_problem_of_epochs_ends_with_the_last_one(store):
    epochs = replace(PROBLEM, seconds=1000, epochs=2)
    (run,) = study([epochs], [EACG], [0], store, None)
    assert run.steps == [0, 5]  # two steps of 8 are less than an epoch of 20
    assert run.epochs[-1] == 2
    assert 0 < run.seconds[-1] < 1000


def test_matrices_have_a_cell_for_each_pair():
    def cell(name, loss, **kwargs):
        return [
            Run("line", name, {}, seed, 1.0, "", "", loss=[9.0, loss + seed], score=[50.0], seconds=[0.0, 2.5], **kwargs)
            for seed in (0, 1, 2)
        ]

    best = {
        "a, p": cell("a, p", 1.0),
        "a, q": cell("a, q", 2.0),
        "b, p": cell("b, p", 3.0),
        "b, q": cell("b, q", 0.0, diverged="x"),
    }
    loss, score, seconds = matrices(PROBLEM, best).split("\n\n")
    assert loss.splitlines() == ["| training loss | a | b |", "|---|---|---|", "| p | 2 | 4 |", "| q | 3 | diverged |"]
    assert score.splitlines()[2] == "| p | 50 | 50 |"
    assert seconds.splitlines()[2] == "| p | 2.5 | 2.5 |"


def test_seconds_to_a_loss_are_linear_between_evaluations():
    run = Run("", "", {}, 0, 4.0, "", "", seconds=[0.0, 2.0, 4.0], loss=[10.0, 8.0, 2.0])
    assert run.seconds_to(11) == 0
    assert run.seconds_to(9) == 1
    assert run.seconds_to(5) == 3
    assert run.seconds_to(1) == math.inf


def test_tables_go_between_their_marks(tmp_path):
    document = tmp_path / "results.md"
    document.write_text("a\n<!-- x -->\nold\n<!-- end of x -->\nb\n")
    insert(document, "x", "new")
    assert document.read_text() == "a\n<!-- x -->\nnew\n<!-- end of x -->\nb\n"
    with pytest.raises(ValueError, match="<!-- y -->"):
        insert(document, "y", "new")


def test_every_experiment_has_its_place_on_the_page():
    page = (ROOT / "docs" / "results.md").read_text()
    for name in Name:
        assert page.count(f"<!-- {name.value} -->\n") == page.count(f"\n<!-- end of {name.value} -->") == 1


def test_the_jet_net_gives_the_derivatives_of_its_value():
    net = JetNet([2, 5, 4, 1]).double()
    x = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    jet = net(x)
    (first,) = torch.autograd.grad(jet[:, 0].sum(), x, create_graph=True)
    second = [torch.autograd.grad(first[:, i].sum(), x, retain_graph=True)[0][:, i] for i in (0, 1)]
    torch.testing.assert_close(jet[:, 1:3], first)
    torch.testing.assert_close(jet[:, 3:], torch.stack(second, 1))


def test_the_poisson_loss_vanishes_at_a_solution():
    x = torch.rand(7, 2)
    u = x[:, 0] * (1 - x[:, 0])  # u_xx = -2
    jet = torch.stack([u, 1 - 2 * x[:, 0], torch.zeros(7), torch.full((7,), -2.0), torch.zeros(7)], 1)
    target = torch.stack([torch.full((7,), -2.0), torch.ones(7), u], 1)
    assert PoissonLoss()(jet, target) == 0
    target[:, 1] = 0  # on the boundary u itself counts
    torch.testing.assert_close(PoissonLoss()(jet, target), 100 * u.square().mean())


def test_the_mixture_loss_is_the_likelihood_of_eq_27():
    output, target = torch.randn(9, 3, dtype=torch.float64), torch.arange(9) % 2
    gate, first, second = output.sigmoid().unbind(1)
    p = gate * first**target * (1 - first) ** (1 - target) + (1 - gate) * second**target * (1 - second) ** (1 - target)
    torch.testing.assert_close(MIXTURE.criterion()(output, target.double()), -p.log().mean())


def test_the_names_of_methods_and_problems_are_keys():
    for studies in STUDIES.values():
        for each in studies:
            for named in (each.problems, each.methods):
                assert len({item.name for item in named}) == len(named)


@pytest.mark.filterwarnings("ignore:secondorder. the loss of EACG")  # without a bound it diverges
def test_the_table_of_scales(tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("plotnine")
    threads = torch.get_num_threads()
    try:
        scales.main(steps=5, seed=0, width=8, every=49, out=tmp_path / "scales.md")
    finally:
        torch.set_num_threads(threads)
    text = (tmp_path / "scales.md").read_text()
    assert text in capsys.readouterr().out + "\n"
    assert "| `EACG(model, criterion)` | 5 | 0 |" in text
    assert "| `EACG(model, criterion, max_step=None)` | 5 |" in text
