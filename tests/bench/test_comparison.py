"""Runs that take turns, and what is computed of them, against numbers by hand."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench import peers
from bench.data import Dataset
from bench.experiments import comparison, eigen_adam, training
from bench.experiments.comparison import best_peer, geometric_mean, loss_ratio, paired, score_difference, time_ratio
from bench.experiments.harness import Method, Problem, Run, Store, Supervised, best_runs
from bench.experiments.training import Training, study, take_turns
from bench.micro.memory import tensor_bytes
from bench.timing import RESULTS


def run(loss, method="own", seed=0, score=1.0, **kwargs):
    """Evaluated every second."""
    return Run(
        "p", method, {}, seed, len(loss) - 1.0, "", "", loss=loss, score=[score] * len(loss),
        seconds=[float(i) for i in range(len(loss))], steps=list(range(len(loss))), **kwargs,
    )  # fmt: skip


def test_the_time_ratio_is_a_share_of_the_peers_seconds():
    own, peer = run([10.0, 6.0, 2.0, 1.0, 1.0]), run([10.0, 9.0, 8.0, 5.0, 4.0])
    assert time_ratio(own, peer) == pytest.approx(1.5 / 4)  # 4 lies halfway between 6 and 2
    assert time_ratio(peer, own) == pytest.approx(4 / 1.5)  # the other's whole seconds over those until it is at 4


def test_losses_below_a_thousandth_of_the_first_are_not_told_apart():
    own, peer = run([10.0, 5.01, 1e-9, 1e-9, 1e-9]), run([10.0, 5.0, 5.0, 0.01, 1e-5])
    assert loss_ratio(own, peer) == 1
    # The goal is 0.01: own is there after just under 2 seconds, the peer after 3 of its 4.
    assert time_ratio(own, peer) == pytest.approx((1 + 5.0 / 5.01) / 3)
    assert time_ratio(peer, own) == pytest.approx(3 / (1 + 5.0 / 5.01))
    assert loss_ratio(run([10.0, 0.04]), run([10.0, 0.001])) == pytest.approx(4)


def test_losses_of_any_sign_are_compared_by_what_was_gained():
    own, peer, none = run([2.0, 0.0, -3.0]), run([2.0, 0.0, -2.0]), run([2.0, 2.5, 2.0])
    assert loss_ratio(peer, own, True) == pytest.approx(1 + 1 / 5)
    assert loss_ratio(own, peer, True) == pytest.approx(1 / (1 + 1 / 5))
    assert loss_ratio(own, none, True) == pytest.approx(1 / 2)  # which has gained nothing
    assert loss_ratio(none, none, True) == 1
    assert time_ratio(own, peer, True) == pytest.approx((1 + 2 / 3) / 2)


def test_a_method_that_diverged_or_never_moved_has_the_limit():
    good, stuck, lost = run([10.0, 5.0]), run([10.0, 10.0]), run([10.0], diverged="x")
    assert time_ratio(stuck, good) == time_ratio(lost, good) == comparison.LIMIT
    assert loss_ratio(stuck, good) == loss_ratio(lost, good) == 2
    assert time_ratio(good, lost) == 1 / comparison.LIMIT


def test_scores_differ_in_their_unit_and_errors_in_percent():
    own, peer = run([1.0], score=84.0), run([1.0], score=80.0)
    assert score_difference(own, peer, True) == 4
    assert score_difference(own, peer, False) == pytest.approx(5)


def test_runs_stopped_in_time_have_their_best_scores():
    own, peer = run([1.0], score=84.0), run([1.0], score=80.0)
    own.score[:], peer.score[:] = [70.0, 90.0, 84.0], [95.0, 60.0, 80.0]
    assert score_difference(own, peer, True, True) == -5
    assert score_difference(own, peer, False, True) == pytest.approx(100 * 10 / 60)


def test_medians_are_over_seeds_in_pairs():
    own = [run([8.0, 1.0], seed=0), run([8.0, 6.0], seed=1), run([8.0, 2.0], seed=2)]
    peer = [run([8.0, 4.0], "peer", seed=2), run([8.0, 4.0], "peer", seed=0), run([8.0, 2.0], "peer", seed=1)]
    assert paired(loss_ratio, own, peer) == pytest.approx(0.5)  # of 1 / 4, 3 and 2 / 4
    worse = [run([8.0, 5.0], "worse", seed) for seed in (0, 1, 2)]
    assert best_peer({"own": own, "own, falling": own, "worse": worse, "peer": peer}, "own") == "peer"
    assert geometric_mean([0.5, 8.0]) == pytest.approx(2)


def test_the_summary_has_means_the_worst_and_counts():
    first = Problem("first", "", seconds=4, score_name="accuracy", higher=True)
    second = Problem("second", "", seconds=4, score_name="error")
    best = {
        "first": {
            "own": [run([8.0, 4.0, 2.0], score=90.0)],
            "own, falling": [run([8.0, 6.0, 1.0], score=95.0)],
            "Adam": [run([8.0, 6.0, 4.0], score=91.0)],
        },
        "second": {
            "own": [run([8.0, 6.0, 4.0], score=2.0)],
            "own, falling": [run([8.0, 6.0, 3.5], score=4.0)],
            "Adam": [run([8.0, 4.0, 3.5], score=3.0)],
        },
    }
    # Time: 1 of 2 seconds; 2 seconds over the 1 after which Adam is at 4. Loss: 2 / 4; 4 / 3.5.
    lines = comparison.summary([first, second], best, ["own", "own, falling", "Adam"]).splitlines()
    assert lines[4] == "| own | Adam | 1.00 | 2.00, second | 1 of 2 | 0.76 | 1.14, second | 1 of 2 | 1 of 2 |"
    assert lines[2] == lines[4].replace("Adam", "the best peer")
    # Its other setting, which is no peer: at Adam's loss after 1.4 and 2 of 2 seconds.
    assert lines[3] == "| own, falling | the best peer | 0.84 | 1.00, second | 1 of 2 | 0.50 | 1.00, second | 1 of 2 | 1 of 2 |"
    assert len(lines) == 5


def noisy(name="noisy", seconds=32.0):
    x = torch.linspace(-1, 1, 40).reshape(20, 2)
    return Supervised(
        name, "2-8-1", lambda _: Dataset("a line", x, x.sum(1, keepdim=True), x, x.sum(1, keepdim=True)),
        lambda: nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1)), nn.MSELoss, batch=8, seconds=seconds,
        score=lambda output, target: (output - target).abs().max().item(), score_name="error",
    )  # fmt: skip


def sgd(name, *settings):
    return Method(name, lambda model, _, lr=0.1: torch.optim.SGD(model.parameters(), lr), settings or ({},))


@pytest.fixture
def _a_second_a_step(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(training.time, "process_time", lambda: float(next(ticks)))


@pytest.mark.usefixtures("_a_second_a_step")
def test_a_run_in_turns_is_the_run_alone():
    problem = noisy()
    pairs = [(sgd("a"), {"lr": 0.1}), (sgd("b"), {"lr": 0.01})]
    together = take_turns([Training(problem, *pair, 3, 32.0, None) for pair in pairs])
    alone = [take_turns([Training(problem, *pair, 3, 32.0, None)])[0] for pair in pairs]
    assert together == alone
    assert together[0].loss[0] == together[1].loss[0]
    assert together[0].loss[-1] != together[1].loss[-1]
    assert together[0].seconds == [0.0, *map(float, range(2, 33, 2))]  # the first second makes the optimizer
    assert together[0].steps[-1] == 31


@pytest.mark.usefixtures("_a_second_a_step")
def test_turns_go_round(monkeypatch):
    order = []
    step = training._step
    monkeypatch.setattr(training, "_step", lambda task, *rest: (order.append(id(task)), step(task, *rest)))
    under_way = [Training(noisy(), sgd(name), {}, 0, 32.0, None) for name in "ab"]
    order.clear()  # of the warm-up
    take_turns(under_way)
    turns = [key for key, _ in itertools.groupby(order)]
    assert len(turns) == 2 * noisy().evaluations
    assert set(turns[::2]) == {id(under_way[0].task)}


@pytest.mark.usefixtures("_a_second_a_step")
def test_schedule_free_is_evaluated_at_its_average():
    method = Method("a", lambda model, _: peers.schedule_free(model, 0.1))
    one = Training(noisy(), method, {}, 0, 32.0, None)
    one.advance()
    one.advance()
    last = [p.detach().clone() for p in one.task.model.parameters()]
    one.optimizer.eval()
    average = one.task.evaluate()[0]
    one.optimizer.train()
    assert all(torch.allclose(p, q) for p, q in zip(last, one.task.model.parameters(), strict=True))
    assert one.run.loss[-1] == pytest.approx(average, rel=1e-4)
    assert one.run.loss[-1] != pytest.approx(one.task.evaluate()[0], rel=1e-4)


@pytest.mark.usefixtures("_a_second_a_step")
def test_a_linear_setting_falls_to_zero_at_the_end():
    one = Training(noisy(), sgd("a"), {"lr": 0.01, "linear": 1.0}, 0, 32.0, None)
    rates = []
    while not one.done:
        one.advance()
        rates.append(one.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01 * (1 - k / 16) for k in range(1, 17)])


@pytest.mark.usefixtures("_a_second_a_step")
def test_what_is_stored_is_not_trained_again(tmp_path, monkeypatch):
    first, second = noisy("first"), replace(noisy("second"), higher=True)
    methods = [sgd("EigenAdam"), sgd("Adam", {"lr": 0.01}, {"lr": 0.1, "linear": 1.0})]
    monkeypatch.setattr(eigen_adam, "COMPARISONS", {"few": eigen_adam.Contest([first, second], methods, "eigen_adam")})
    eigen_adam.compare("few", tmp_path, None, [0, 1], chosen=["first"])
    stored = Store(tmp_path / "eigen_adam.jsonl")
    assert [(r.method, r.seed) for r in stored.runs()] == [
        ("EigenAdam", 0), ("Adam", 0), ("Adam", 0), ("EigenAdam", 1), ("Adam", 1),
    ]  # fmt: skip
    before = stored.path.read_text()
    text = eigen_adam.compare("few", tmp_path, None, [0, 1])
    assert stored.path.read_text().startswith(before)
    assert len(stored.runs()) == 10
    for table in text.split("\n\n")[:-2]:
        lines = table.splitlines()
        assert len({line.count("|") for line in lines}) == 1
    assert "| first |" in text
    assert "- second: 2-8-1; a line." in text
    monkeypatch.setattr(training, "Training", None)  # nothing is trained
    assert eigen_adam.compare("few", tmp_path, None, [0, 1]) == text
    assert eigen_adam.compare("few", tmp_path, None, [0], only=["Adam"]) == ""
    with pytest.raises(ValueError, match="third"):
        eigen_adam.compare("few", tmp_path, None, [0], chosen=["third"])


def test_a_singular_matrix_counts_as_divergence(tmp_path):
    class Singular(torch.optim.SGD):
        def step(self, closure=None):
            raise torch.linalg.LinAlgError("singular")

    (failed,) = study(
        [noisy(seconds=0.01)], [Method("x", lambda model, _: Singular(model.parameters()))], [0], Store(tmp_path / "x"), None
    )
    assert "singular" in failed.diverged


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_the_iteration_in_float32_is_muons(shape):
    muon = pytest.importorskip("torch.optim._muon")
    grad = torch.randn(shape)
    own = peers.orthogonalized(grad)
    torch.testing.assert_close(
        own, muon._zeropower_via_newtonschulz(grad, peers.NEWTON_SCHULZ, 5, 1e-7).float(), atol=0.05, rtol=0
    )
    assert torch.linalg.svdvals(own).max() < 1.3


@pytest.mark.parametrize("make", [peers.muon, peers.soap, peers.schedule_free, peers.shampoo])
def test_peers_take_the_whole_model_and_a_schedule(make):
    if make is peers.muon and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon before 2.9")
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = make(model, 0.01)
    chosen = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in chosen} == {id(p) for p in model.parameters()}
    assert len(chosen) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        assert group["lr"] == 0.01
        assert group["weight_decay"] == 0
        group["lr"] = 0.0
    before = [p.clone() for p in model.parameters()]
    for _ in range(2):  # SOAP's first step moves nothing
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))


def test_the_tensors_of_a_state_are_counted():
    state = {0: {"step": 3, "a": torch.zeros(4)}, 1: {"b": [torch.zeros(2, dtype=torch.float64), (torch.zeros(1),)]}}
    assert tensor_bytes(state) == 16 + 16 + 4


def test_the_picture_shows_stored_runs_of_every_problem_that_it_names(tmp_path):
    best = best_runs(Store(RESULTS / "eigen_adam.jsonl").runs())
    assert eigen_adam.SHOWN.keys() <= best.keys()
    assert all(next(iter(best[problem])) == "EigenAdam" for problem in eigen_adam.SHOWN)  # the one in black
    eigen_adam.picture(RESULTS, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
