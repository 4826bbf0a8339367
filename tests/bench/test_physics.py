"""The physics problems: their solutions solve their equations, and the experiment goes on where it was interrupted."""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import chebyshev

import secondorder as so
from bench import peers
from bench.experiments import training
from bench.experiments.harness import Method, Run, Store
from bench.experiments.physics import PROBLEMS, errors, evolution
from bench.experiments.physics.problem import Points, laplacian, partials

BY_NAME = {problem.name: problem for problem in PROBLEMS}
SYSTEMS = ["Lorenz", "van der Pol", "pendulum"]
SOLVED = [*SYSTEMS, "Allen-Cahn"]  # by a solver, not by a formula
pytest.importorskip("scipy")


def polynomial(times, values, degree):
    """A function of t that autograd knows, near the values [n, k] at these times."""
    end = times.max().item()
    fits = [chebyshev.Chebyshev.fit(times.squeeze(1).numpy(), v.numpy(), degree, domain=[0, end]) for v in values.T]
    coefficients = torch.from_numpy(np.stack([fit.coef for fit in fits]))

    def function(t):
        s = 2 * t / end - 1
        older, newer = torch.ones_like(s), s
        total = coefficients[:, 0] * older + coefficients[:, 1] * newer
        for c in coefficients.T[2:]:
            older, newer = newer, 2 * s * newer - older
            total = total + c * newer
        return total

    return function


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.name not in SOLVED], ids=lambda problem: problem.name)
def test_the_formula_is_a_zero_of_the_loss_and_the_solution_at_the_points(problem):
    equation = problem.equation()
    torch.testing.assert_close(equation.exact(equation.points), equation.solution)
    loss = equation.loss(equation.exact).item()
    if problem.name == "noisy regression":
        assert loss == pytest.approx(0.1**2, rel=0.2)
    else:
        assert loss < 1e-24
    if equation.coefficient:
        assert equation.exact.coefficient.item() == equation.coefficient


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_polynomial_through_the_solution_is_nearly_a_zero_of_the_loss(name):
    equation = BY_NAME[name].equation()
    assert len(equation.points) == len(equation.solution) == 501
    assert equation.loss(polynomial(equation.points, equation.solution, 80)).item() < 1e-10


def test_the_solution_of_allen_cahn_solves_it_by_finite_differences():
    h, fine = 1e-4, 4 * evolution.MODES
    for t in (0.3, 0.7):
        states = evolution.allen_cahn_states([t - h, t, t + h])
        spectra = np.fft.rfft(states)
        assert np.abs(spectra[:, -20:]).max() < 1e-8 * np.abs(spectra).max()  # nothing is left beyond the modes
        before, u, after = np.fft.irfft(4 * spectra, fine)
        bend = (np.roll(u, 1) - 2 * u + np.roll(u, -1)) / (2 / fine) ** 2
        residual = (after - before) / (2 * h) - 1e-4 * bend - 5 * (u - u**3)
        assert np.abs(residual).max() < 1e-3
        assert np.abs(5 * (u - u**3)).max() > 1


def test_the_loss_of_allen_cahn_is_nearly_zero_at_its_solution():
    """A function that autograd knows: cosines of x, for the solution is even, whose coefficients are polynomials of t."""
    times = np.linspace(0, 1, 501)
    spectra = np.fft.rfft(evolution.allen_cahn_states(times))[:, :200] * 2 / evolution.MODES
    spectra[:, 0] /= 2
    assert np.abs(spectra.imag).max() < 1e-12
    amplitudes = polynomial(torch.from_numpy(times).unsqueeze(1), torch.from_numpy(spectra.real.copy()), 80)
    frequencies = math.pi * torch.arange(200)

    def u(points):
        return (amplitudes(points[:, :1]) * (frequencies * (points[:, 1:] + 1)).cos()).sum(1, keepdim=True)

    equation = BY_NAME["Allen-Cahn"].equation()
    torch.testing.assert_close(u(equation.points[-1000:]), equation.solution[-1000:], atol=1e-4, rtol=0)
    assert equation.loss(u).item() < 1e-6 < 10 < equation.loss(lambda x: 1e-9 * u(x)).item()


def test_burgers_formula_begins_as_it_should_and_is_odd():
    x = Points([0.0, -1.0], [1.0, 1.0]).inside(200)
    mirrored = x * torch.tensor([1.0, -1.0])
    torch.testing.assert_close(evolution.cole_hopf(mirrored), -evolution.cole_hopf(x))
    x[:, 0] = 0
    torch.testing.assert_close(evolution.cole_hopf(x), -(math.pi * x[:, 1:]).sin())


def test_derivatives_are_those_by_hand():
    x = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    u = x[:, :1] ** 3 * x[:, 1:2] + x[:, 2:].sin()
    first, second, third = partials(u, x)
    torch.testing.assert_close(first, 3 * x[:, :1] ** 2 * x[:, 1:2])
    torch.testing.assert_close(second, x[:, :1] ** 3)
    torch.testing.assert_close(third, x[:, 2:].cos())
    torch.testing.assert_close(laplacian(u + x[:, 1:2] ** 2 * 1.0, x), 6 * x[:, :1] * x[:, 1:2] - x[:, 2:].sin() + 2)


def test_faces_have_one_coordinate_at_an_end():
    points = Points([0.0, -1.0], [2.0, 3.0]).faces(40)
    assert (points[::2, 0] * (points[::2, 0] - 2) == 0).all()
    assert ((points[1::2, 1] + 1) * (points[1::2, 1] - 3) == 0).all()
    assert len(points.unique()) > 40
    assert (Points([0.0, -1.0], [2.0, 3.0]).faces(40, [1])[:, 1].abs() >= 1).all()


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_seeds_decide_the_net_and_not_the_points(problem):
    def values(seed):
        torch.manual_seed(seed)
        task = problem.begin(None, seed)
        assert all(p.dtype == torch.float64 for p in task.model.parameters())
        return *task.evaluate(), *task.more().values()

    assert values(3) == values(3) != values(4)
    assert all(map(math.isfinite, values(0)))


def test_names_are_keys_of_the_stored_runs():
    assert len(BY_NAME) == len(PROBLEMS)
    for problem in PROBLEMS:
        methods = errors.methods_for(problem)
        assert len({method.name for method in methods}) == len(methods)


@pytest.fixture
def _few_methods(monkeypatch):
    chosen = [method for method in errors.METHODS if method.name in ("LevenbergMarquardt", "Adam")]
    monkeypatch.setattr(errors, "METHODS", chosen)


@pytest.mark.usefixtures("_few_methods")
def test_what_is_stored_is_not_trained_again(tmp_path, monkeypatch):
    chosen = ["unknown diffusivity"]
    text = errors.compare(tmp_path, [0, 1], 0.02, chosen=chosen)
    store = Store(tmp_path / errors.RESULTS)
    assert [(run.method, run.seed) for run in store.runs()] == [
        ("LevenbergMarquardt", 0), *[("Adam", 0)] * 4, ("LevenbergMarquardt", 1), ("Adam", 1),
    ]  # fmt: skip
    for run in store.runs():
        assert not run.diverged
        assert len(run.more["coefficient"]) == len(run.score) == len(run.seconds) > 1
        assert run.score[-1] < run.score[0]
    for table in text.split("\n\n")[:4]:
        assert len({line.count("|") for line in table.splitlines()}) == 1
        assert table.splitlines()[2].startswith("| unknown diffusivity | ")
    before = store.path.read_text()
    monkeypatch.setattr(training, "Training", None)  # nothing is trained
    assert errors.compare(tmp_path, [0, 1], 0.02, chosen=chosen) == text
    assert errors.stored(tmp_path, 0.02) == errors.stored(tmp_path, 0.02, chosen) == text
    assert errors.compare(tmp_path, [0], 0.02, only=["Adam"], chosen=chosen) == ""
    assert store.path.read_text() == before
    with pytest.raises(ValueError, match="turbulence"):
        errors.compare(tmp_path, [0], chosen=["turbulence"])


def test_tables_have_medians_over_seeds():
    def run(method, seed, score, **kwargs):
        times = [float(i) for i in range(len(score))]
        return Run("heat", method, {}, seed, 6.0, "points", "a machine", seconds=times, score=score, loss=score,
                   steps=list(range(len(score))), **kwargs)  # fmt: skip

    good = [run("LevenbergMarquardt", seed, [1.0, 1e-2, last]) for seed, last in enumerate((1e-4, 5e-5, 2e-3))]
    bad = [run("L-BFGS", seed, [1.0, 0.1], diverged="x" if seed else "") for seed in range(3)]
    text = errors.tables([BY_NAME["heat"]], {"heat": {"LevenbergMarquardt": good, "L-BFGS": bad}})
    first, seconds, losses, setup, machine = text.split("\n\n")
    assert first.splitlines()[2] == "| heat | 6 | **1.0e-04 (5.0e-05 to 2.0e-03)** | diverged (1.0e-01 to diverged) |"
    assert seconds.splitlines()[2] == "| heat | 6 | 1.9 / 2 / - / - | - / - / - / - |"
    assert losses.splitlines()[2] == "| heat | 6 | 1.0e-04 (5.0e-05 to 2.0e-03); 2 | diverged (1.0e-01 to diverged); 1 |"
    assert setup.startswith("- heat: ") and setup.endswith("; points.")
    assert machine == "Measured on: a machine."


@pytest.mark.parametrize("method", errors.METHODS, ids=lambda method: method.name)
def test_every_method_takes_steps_on_an_equation(method, tmp_path):
    shortest = Method(method.name, method.make, method.grid[:1])
    (run,) = training.study([BY_NAME["heat"]], [shortest], [0], Store(tmp_path / "x"), None, 0.01)
    assert not run.diverged
    assert run.loss[-1] < run.loss[0]


@pytest.mark.skipif(not peers.has_torch_levenberg_marquardt(), reason="torch-levenberg-marquardt is not installed")
def test_torch_levenberg_marquardt_fits_examples(tmp_path):
    problem = BY_NAME["regression"]
    (method,) = [method for method in errors.methods_for(problem) if method.name == errors.REGRESSION]
    (run,) = training.study([problem], [method], [0], Store(tmp_path / "x"), None, 0.2)
    assert not run.diverged
    assert run.loss[-1] < 0.5 * run.loss[0]
    assert peers.has_torch_levenberg_marquardt()  # still, though a part of it alone was imported


def test_a_levenberg_marquardt_step_evaluates_the_loss_itself():
    assert issubclass(so.LevenbergMarquardt, training.CLOSURES)


@pytest.mark.parametrize("name", ["LevenbergMarquardt", "EigenAdam", "L-BFGS", "Adam, lr 0.01"])
def test_deepxde_trains_with_the_optimizer_exchanged(name):
    pytest.importorskip("deepxde")
    from bench.experiments import with_deepxde

    run = with_deepxde._train(name, 0, 0.3)
    assert run["steps"] >= 1
    assert run["seconds"][-1] >= 0.3
    assert 0 < run["errors"][-1] < 1.5
    assert torch.get_default_dtype() == torch.float32
