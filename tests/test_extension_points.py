"""A curvature or a solver of one's own, as an object or by a name, is used as those of the package are."""

import copy
import pickle
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import secondorder as so
from secondorder import curvature as curvatures
from secondorder import solvers


@dataclass(frozen=True)
class Rms(solvers.Solver):
    """P = -B / (sqrt(E[h^2]) + l), d = -g: with a statistic that no solver of the package has."""

    def statistics(self, inputs, samples):
        return [{"input_square": h.square().mean(0)} for h in inputs]

    def prepare(self, factors, scale, damping):
        assert factors["bias_hessian"].dim() == 2
        return {"divisor": factors["input_square"].sqrt() + damping}

    def solve(self, prepared, grad_weight, grad_bias):
        return -grad_weight / prepared["divisor"], None if grad_bias is None else -grad_bias


class Identity(curvatures.Curvature):
    """H = I."""

    def _block(self, record, above):
        n_out = record.layer.out_features
        return torch.eye(n_out, dtype=record.dtype)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def train(model, optimizer, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(9, 5, generator=generator).double(), torch.randint(3, (9,), generator=generator)
        optimizer.zero_grad()
        loss = optimizer.criterion(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("make", [so.EACG, so.LayerwiseNewton])
@pytest.mark.parametrize(("curvature_every", "inverse_every"), [(1, 1), (3, 1), (1, 3), (2, 3)])
def test_a_solver_object_with_a_statistic_of_its_own(make, curvature_every, inverse_every):
    model, other = network(), network()
    options = {"solver": Rms(), "curvature_every": curvature_every, "inverse_every": inverse_every}
    optimizer = make(model, nn.CrossEntropyLoss(), **options)
    train(model, optimizer, range(8))
    assert optimizer.state[model[0].weight]["factors"].keys() == {"bias_hessian", "input_square"}
    # Resumed in the middle, to the bit.
    first = make(other, nn.CrossEntropyLoss(), **options)
    train(other, first, range(4))
    saved = copy.deepcopy(first.state_dict())
    first.remove_hooks()
    resumed = make(other, nn.CrossEntropyLoss(), **options)
    resumed.load_state_dict(saved)
    train(other, resumed, range(4, 8))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_the_step_of_ones_own_solver_is_taken():
    model = network()
    before, x, y = copy.deepcopy(model), torch.randn(9, 5).double(), torch.arange(9) % 3
    optimizer = so.EACG(model, nn.CrossEntropyLoss(), lr=0.5, alpha=0.1, solver=Rms(), momentum=0.0)
    optimizer.criterion(model(x), y).backward()
    optimizer.step()
    divisor = x.square().mean(0).sqrt() + 0.1
    torch.testing.assert_close(model[0].weight, before[0].weight - 0.5 * model[0].weight.grad / divisor)
    torch.testing.assert_close(model[0].bias, before[0].bias - 0.5 * model[0].bias.grad)


def test_a_curvature_object_of_ones_own():
    model, curved = network(), Identity()
    optimizer = so.EACG(model, nn.CrossEntropyLoss(), curvature=curved, solver="kfi")
    train(model, optimizer, range(3))
    torch.testing.assert_close(optimizer.state[model[0].weight]["factors"]["bias_hessian"], torch.eye(7).double())


def test_names_of_ones_own(monkeypatch):
    monkeypatch.setattr(solvers.base, "SOLVERS", dict(solvers.SOLVERS))
    monkeypatch.setattr(curvatures.base, "CURVATURES", dict(curvatures.CURVATURES))
    solvers.register("rms", lambda options: Rms())
    curvatures.register("identity", Identity())
    models = [network(), network()]
    train(models[0], so.EACG(models[0], nn.CrossEntropyLoss(), solver="rms", curvature="identity"), range(3))
    train(models[1], so.EACG(models[1], nn.CrossEntropyLoss(), solver=Rms(), curvature=Identity()), range(3))
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))
    with pytest.raises(ValueError, match="expected a name that no solver has yet, got 'kfi'"):
        solvers.register("kfi", lambda options: Rms())
    with pytest.raises(ValueError, match="expected a name that no curvature has yet, got 'kflr'"):
        curvatures.register("kflr", Identity())


def test_a_solver_object_has_its_own_settings():
    model = network()
    with pytest.raises(ValueError, match="EACG: expected max_cg to be left to the solver that was given as an object, got 3"):
        so.EACG(model, nn.CrossEntropyLoss(), solver=Rms(), max_cg=3)


def test_what_is_no_solver_is_refused():
    for wrong in ("cg", Rms, object()):
        with pytest.raises(ValueError, match="EACG: expected solver to be one of .*'ea-cg', .*, or a Solver, got"):
            so.EACG(network(), nn.CrossEntropyLoss(), solver=wrong)

    class Half(solvers.Solver):
        def statistics(self, inputs, samples):
            return [{} for _ in inputs]

    with pytest.raises(TypeError, match="abstract"):
        Half()


def test_objects_are_copied_pickled_and_shown_as_names_are():
    model = network()
    optimizer = so.EACG(model, nn.CrossEntropyLoss(), solver=Rms(), curvature=curvatures.KFLRCurvature(), inverse_every=2)
    train(model, optimizer, range(3))
    assert "KFLRCurvature() by Rms()" in repr(optimizer)
    for how in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        twin, twin_optimizer = how((model, optimizer))
        ours, theirs = copy.deepcopy((model, optimizer)), (twin, twin_optimizer)
        assert train(*ours, range(3, 6)) == train(*theirs, range(3, 6))


def test_a_curvature_without_recursion_starts_nowhere_anew():
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = so.EACG(model, nn.CrossEntropyLoss(), curvature=Identity(), solver="kfi")
        train(model, optimizer, range(2))
    assert not any("recursion" in str(w.message) for w in caught)
    assert "empirical Fisher" not in repr(optimizer)


def test_settings_of_solver_objects_are_checked():
    for make in (solvers.EACGSolver, solvers.KroneckerCG):
        with pytest.raises(ValueError, match="expected max_cg to be an int >= 1, got 0"):
            make(0, 1e-4)
        with pytest.raises(ValueError, match="expected eps_cg >= 0, got -1"):
            make(3, -1)


def test_a_warning_points_at_the_users_line():
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).double()
    optimizer = so.EACG(model, nn.CrossEntropyLoss())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, [0])
    assert len(caught) == 2  # the norm's own parameters, and the recursion that ends at it
    assert {w.filename for w in caught} == {__file__}


@pytest.mark.parametrize(("package", "names"), [("solvers", "SOLVERS"), ("curvature", "CURVATURES")])
def test_a_file_in_the_folder_is_found_by_its_being_there(package, names, tmp_path):
    """In a copy of the package, of links but for the one new file."""
    own, copied = Path(so.__file__).parent, tmp_path / "secondorder"
    (copied / package).mkdir(parents=True)
    for source, target in ((own, copied), (own / package, copied / package)):
        for entry in source.iterdir():
            if entry.name not in (package, "__pycache__"):
                (target / entry.name).symlink_to(entry)
    (copied / package / "of_ones_own.py").write_text(f"from secondorder.{package}.base import register\nregister('own', None)\n")
    script = f"from secondorder.{package} import {names}; assert 'own' in {names}, {names}"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


def test_auto_keeps_no_larger_factor_than_it_may():
    model = network()
    optimizer = so.LayerwiseNewton(model, nn.CrossEntropyLoss(), max_factor_elements=30)
    train(model, optimizer, [0])
    kept = [optimizer.state[model[i].weight]["factors"].keys() for i in (0, 2)]  # 5 and 7 inputs
    assert ["input_second_moment" in each for each in kept] == [True, False]
