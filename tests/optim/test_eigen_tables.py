"""Tables of embeddings: a row that a step meets now and then moves by more; what is indexed, or has one gradient, is no map."""

import copy

import pytest
import torch
from torch import nn

import secondorder as so


class Factors(nn.Module):
    """A matrix of rank 5 as products of rows of two tables."""

    def __init__(self, rows, parameters=False):
        super().__init__()
        tables = [0.1 * torch.randn(rows, 8) for _ in range(2)]
        self.tables = nn.ParameterList(tables) if parameters else nn.ModuleList(nn.Embedding(rows, 8, _weight=t) for t in tables)

    def forward(self, i, j):
        a, b = (table[k] if isinstance(table, nn.Parameter) else table(k) for table, k in zip(self.tables, (i, j)))
        return (a * b).sum(1)


def trained(make, rows, batch, steps, parameters=False):
    """The mean loss of the last 50 steps."""
    torch.manual_seed(0)
    target = torch.randn(rows, 5) @ torch.randn(5, rows)
    model = Factors(rows, parameters)
    optimizer, losses = make(model), []
    for _ in range(steps):
        i, j = torch.randint(rows, (batch,)), torch.randint(rows, (batch,))
        loss = (model(i, j) - target[i, j]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-50:]) / 50


@pytest.mark.parametrize("parameters", [False, True])
def test_tables_whose_rows_a_step_mostly_misses_are_trained(parameters):
    adam = trained(lambda model: torch.optim.Adam(model.parameters(), 1e-2), 200, 64, 700, parameters)
    assert trained(so.EigenAdam, 200, 64, 700, parameters) < 2 * adam


@pytest.mark.parametrize(("looked_up", "share"), [(24, 1.0), (6, 0.25), (1, 0.2)])
def test_a_row_moves_by_the_steps_between_two_lookups(looked_up, share):
    """Beside a vector of the same numbers: 2 n / m times as far where m of n rows are looked up, ten times at most."""
    torch.manual_seed(0)
    table = nn.Embedding(24, 3)
    weight, rows = table.weight.detach().clone(), torch.randperm(24)[:looked_up]
    plain = nn.Parameter(weight[rows].flatten())  # a vector: Adam's rule with no table
    one, other = so.EigenAdam(table, weight_decay=0.3), so.EigenAdam([plain], weight_decay=0.3)
    direction = torch.randn(looked_up, 3)
    for _ in range(3):
        for optimizer, rows_of in ((one, lambda: table(rows)), (other, lambda: plain.view(-1, 3))):
            optimizer.zero_grad()
            (rows_of() * direction).sum().backward()
            optimizer.step()
    assert one.state[table.weight]["share"] == share
    moved, plainly = table.weight[rows].detach(), plain.detach().view(-1, 3)
    lengths = (0.01 / 14 * torch.tensor([2, 3, 4])).double()
    shrunk = weight[rows].double() * (1 - lengths * 0.3).prod()
    ratio = (shrunk - moved) / (shrunk - plainly)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2 / share), rtol=1e-2, atol=0)
    others = torch.ones(24, dtype=torch.bool).index_fill(0, rows, False)
    torch.testing.assert_close(table.weight[others], (weight[others].double() * (1 - lengths * 0.3).prod()).float())


def test_an_indexed_parameter_is_resumed_as_a_table():
    torch.manual_seed(0)
    model = Factors(50, parameters=True)
    optimizer = so.EigenAdam(model)

    def step(model, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        i, j = (torch.randint(50, (9,), generator=generator) for _ in range(2))
        optimizer.zero_grad()
        (model(i, j) - 1).square().mean().backward()
        optimizer.step()

    for seed in range(7):
        step(model, optimizer, seed)
    assert optimizer.metrics()["coverage"] == 0
    copied = copy.deepcopy(model)
    resumed = so.EigenAdam(copied)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(7, 12):
        step(model, optimizer, seed)
        step(copied, resumed, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True))


def test_parameters_that_are_exchanged_in_a_group_are_trained():
    torch.manual_seed(0)
    x, y = torch.randn(60, 5), torch.randint(3, (60,))
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    optimizer = so.EigenAdam(model)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    old = model[2].weight
    model[2] = nn.Linear(7, 3)
    before = model[2].weight.detach().clone()
    optimizer.param_groups[0]["params"] = list(model.parameters())
    old.grad = torch.ones_like(old)  # what left the group is let alone, also with a gradient
    kept = old.detach().clone()
    for _ in range(3):
        step()
    assert (model[2].weight != before).all()
    assert torch.equal(old, kept)


class Deviations(nn.Module):
    """A linear layer whose every weight has a normal distribution: a mean, and what a deviation is the softplus of."""

    def __init__(self, n_in, n_out, flat):
        super().__init__()
        self.mean, self.shape = nn.Linear(n_in, n_out), (n_out, n_in)
        self.rho = nn.Parameter(torch.full((n_in * n_out,) if flat else (n_out, n_in), -4.0))

    def forward(self, x):
        deviation = nn.functional.softplus(self.rho.view(self.shape))
        return self.mean(x) + torch.randn(len(x), self.shape[0]) * (x.square() @ deviation.square().T + 1e-8).sqrt()

    def divergence(self):
        deviation = nn.functional.softplus(self.rho)
        return 0.5 * (deviation.square() - 2 * deviation.log()).sum() + 0.5 * self.mean.weight.square().sum()


@pytest.mark.parametrize("given", ["model", "parameters"])
def test_numbers_that_have_much_the_same_gradient_follow_adams_rule(given):
    """As they do where they are a vector, to the last digits."""
    x, losses = torch.randn(400, 12, generator=torch.Generator().manual_seed(0)), []
    y = (x @ torch.randn(12, 4, generator=torch.Generator().manual_seed(1))).argmax(1)
    for flat in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(Deviations(12, 25, flat), nn.ReLU(), Deviations(25, 4, flat))
        optimizer = so.EigenAdam(model if given == "model" else model.parameters())
        for _ in range(40):
            rows = torch.randint(400, (50,))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows]) + (model[0].divergence() + model[2].divergence()) / 400
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        state = optimizer.state[model[0].rho]
        assert not len(state["basis_out"])
        assert "share" not in state
        assert len(optimizer.state[model[0].mean.weight]["basis_out"]) > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    other = so.EigenAdam(model if given == "model" else model.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not len(other.state[model[0].rho]["basis_out"])
    assert other.metrics()["coverage"] == optimizer.metrics()["coverage"] < 0.6


@pytest.mark.parametrize(("scale", "basis"), [(0.5, False), (2.0, True)])
def test_the_mean_of_a_gradient_tells_maps_from_numbers(scale, basis):
    """Of four dimensions and of complex numbers, too; whatever the scale."""
    torch.manual_seed(0)
    for shape, dtype, size in (
        ((20, 3, 4, 4), torch.float32, 1e-25),
        ((20, 30), torch.float64, 1.0),
        ((30, 20), torch.complex64, 1e8),
    ):
        p = nn.Parameter(torch.zeros(shape, dtype=dtype))
        optimizer = so.EigenAdam([p])
        noise = torch.randn(*shape, 2, dtype=torch.float64) if dtype.is_complex else torch.randn(shape, dtype=torch.float64)
        grad = size * (1 + scale * noise)
        p.grad = (torch.view_as_complex(grad) if dtype.is_complex else grad).to(dtype)
        optimizer.step()
        assert bool(len(optimizer.state[p]["basis_out"])) == basis


@pytest.mark.parametrize("first", [float("nan"), None], ids=["a step that is refused", "none"])
def test_a_step_that_is_refused_decides_nothing(first):
    p = nn.Parameter(torch.zeros(6, 4))
    optimizer = so.EigenAdam([p], nonfinite="skip")
    if first is not None:
        p.grad = torch.full_like(p, first)
        p.grad[0] = 1.0
        optimizer.step()
        assert not p.any()
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert len(optimizer.state[p]["basis_in"]) == 0
    assert optimizer.skipped_steps == (first is not None)


def test_a_state_says_whether_its_parameter_is_a_map():
    """Whatever the optimizer that loads it has found; and a state that is refused leaves that as it is."""
    torch.manual_seed(0)
    states, bases = {}, {"numbers": 0, "map": 4}
    for name, gradient in (("numbers", torch.ones(6, 4)), ("map", torch.randn(6, 4))):
        p = nn.Parameter(torch.zeros(6, 4))
        optimizer = so.EigenAdam([p])
        p.grad = gradient
        optimizer.step()
        states[name] = optimizer.state_dict()
        assert len(optimizer.state[p]["basis_in"]) == bases[name]
        for other, state in states.items():
            optimizer.load_state_dict(state)
            optimizer.step()
            assert len(optimizer.state[p]["basis_in"]) == bases[other]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({**states["numbers"], "param_groups": 2 * states["numbers"]["param_groups"]})
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["map"] and optimizer.metrics()["coverage"] == 1
    q = nn.Parameter(torch.zeros(6, 5))
    optimizer = so.EigenAdam([q])
    q.grad = torch.randn(6, 5)
    optimizer.step()
    with pytest.raises(ValueError, match="expected the state of a matrix of shape"):
        optimizer.load_state_dict(states["numbers"])
    optimizer.step()
    assert optimizer.metrics()["coverage"] == 1  # it still has its bases
