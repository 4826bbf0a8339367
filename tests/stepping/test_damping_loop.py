"""The Levenberg-Marquardt loop by itself: on quadratic and other functions of a vector, without an optimizer or a net."""

import pytest
import torch

from secondorder.stepping import DampingSchedule, LevenbergMarquardtLoop, LossTrend, QuadraticModel


class Quadratic:
    """f(x) = 1/2 x^T A x - b^T x + c, at x = `here`; G = A."""

    instances = 500

    def __init__(self, here, matrix, b, c=10.0):
        self.here, self.matrix, self.b, self.c = [here], matrix, b, c
        self.values = 0

    def function(self, x):
        return float(0.5 * x @ self.matrix @ x - self.b @ x + self.c)

    @property
    def start(self):
        return self.function(self.here[0])

    def value(self, parameters):
        self.values += 1
        return self.function(parameters[0])

    def gradient(self):
        return self.matrix @ self.here[0] - self.b

    def products(self, vectors, transfer):
        stacked = torch.stack([v[0] for v in vectors])
        return lambda: (stacked @ self.gradient(), stacked @ self.matrix @ stacked.T)


class Misjudged(Quadratic):
    """Whose values are those of a function far more curved than G says: steps of the model overshoot."""

    factor = 400.0

    def function(self, x):
        d = x - self.origin
        return super().function(x) + float(self.factor * d @ d)

    def __init__(self, here, matrix, b, origin):
        self.origin = origin
        super().__init__(here, matrix, b)


def problem(kind=Quadratic, **kwargs):
    torch.manual_seed(0)
    root = torch.randn(6, 6).double()
    matrix, b, here = root @ root.T / 6 + torch.eye(6).double(), torch.randn(6).double(), torch.randn(6).double()
    return kind(here, matrix, b, **kwargs)


def model_of(loss):
    return QuadraticModel(loss, [loss.gradient()], [0.0])


def newton(loss, seen=None):
    """Directions of damped Newton steps, prepared: the damping."""

    def directions(damping, fresh, transfer=None):
        if seen is not None:
            seen.append((damping, fresh))
        shifted = loss.matrix + damping * torch.eye(6).double()
        return ([-torch.linalg.solve(shifted, loss.gradient())], damping), lambda: None

    return directions


def along(direction):
    """The same direction at every damping."""
    return lambda damping, fresh, transfer: (([direction], None), lambda: None)


def test_a_step_minimises_the_damped_model_along_its_direction():
    loss = problem()
    loop = LevenbergMarquardtLoop(DampingSchedule(tau=0.1, every=1))
    delta, prepared, damping = loop.step(model_of(loss), newton(loss), None, None, 0)
    tau = 0.1 * abs(loss.start)
    assert prepared == pytest.approx(tau)
    d = newton(loss)(tau, False)[0][0][0]
    c = loss.matrix + tau * torch.eye(6).double()
    torch.testing.assert_close(delta[0], -(d @ loss.gradient()) / (d @ c @ d) * d)
    # The loss is its own model, and falls by more than the damped model says: rho > 3/4, and tau falls.
    assert damping.rho > 0.75
    assert damping.tau == pytest.approx(0.95 * tau)


@pytest.mark.parametrize("lr", [1.0, 0.5, 0.0])
def test_the_learning_rate_multiplies_the_step(lr):
    loss = problem()
    whole, part = (
        LevenbergMarquardtLoop(DampingSchedule(tau=0.1)).step(model_of(loss), newton(loss), None, None, 0, rate)
        for rate in (1.0, lr)
    )
    torch.testing.assert_close(part[0][0], lr * whole[0][0])
    # What is predicted is q at the step taken.
    vectors = newton(loss)(1.0, False)[0][0]
    step = model_of(loss).best_step([vectors], 1.0, lr)()
    d, c = step.delta[0], loss.matrix + torch.eye(6).double()
    assert step.predicted == pytest.approx(float(d @ loss.gradient() + 0.5 * d @ c @ d))


def test_momentum_reaches_the_minimum_over_two_directions():
    loss, previous = problem(), [torch.randn(6, generator=torch.Generator().manual_seed(1)).double()]
    loop = LevenbergMarquardtLoop(DampingSchedule(tau=1e-9, momentum=True))
    (delta,), _, damping = loop.step(model_of(loss), along(-loss.gradient()), previous, None, 0)
    plane = torch.stack([-loss.gradient(), previous[0]])
    best = torch.linalg.solve(plane @ loss.matrix @ plane.T, -plane @ loss.gradient())
    torch.testing.assert_close(delta, best @ plane, rtol=1e-6, atol=1e-8)
    assert damping.coefficients == pytest.approx(best.tolist(), rel=1e-6)
    without = LevenbergMarquardtLoop(DampingSchedule(tau=1e-9))
    (other,), _, _ = without.step(model_of(loss), along(-loss.gradient()), previous, None, 0)
    assert loss.value([loss.here[0] + delta]) < loss.value([loss.here[0] + other])


def test_a_step_that_fails_is_tried_anew_with_four_times_the_damping():
    loss = problem(Misjudged, origin=torch.zeros(6).double())
    loss.origin = loss.here[0].clone()
    seen = []
    loop = LevenbergMarquardtLoop(DampingSchedule(tau=0.01, tries=8))
    delta, prepared, damping = loop.step(model_of(loss), newton(loss, seen), None, None, 0)
    dampings = [d for d, _ in seen]
    assert len(dampings) > 2
    assert dampings == pytest.approx([0.01 * abs(loss.start) * 4**k for k in range(len(dampings))])
    assert [fresh for _, fresh in seen] == [False] + [True] * (len(seen) - 1)  # at a new damping nothing prepared may be used
    assert prepared == dampings[-1]
    assert loss.value([loss.here[0] + delta[0]]) < loss.start
    assert damping.tau == pytest.approx(dampings[-1])
    assert damping.rho > 0


def test_where_no_try_helps_the_step_is_zero():
    loss = problem(Misjudged, origin=torch.zeros(6).double())
    loss.origin, loss.factor = loss.here[0].clone(), 1e12
    delta, prepared, damping = LevenbergMarquardtLoop(DampingSchedule(tau=0.01, tries=3)).step(
        model_of(loss), newton(loss), None, None, 0
    )
    assert prepared is None
    assert delta[0].abs().max() == 0
    assert damping.rho is None
    assert damping.tau == pytest.approx(0.01 * abs(loss.start) * 4**4)


def test_at_the_minimum_there_is_nothing_to_follow():
    loss = problem()
    loss.here = [torch.linalg.solve(loss.matrix, loss.b)]
    delta, _, damping = LevenbergMarquardtLoop(DampingSchedule(tau=0.1, every=1)).step(
        QuadraticModel(loss, [torch.zeros(6).double()], [0.0]), along(torch.zeros(6).double()), None, None, 0
    )
    assert delta[0].abs().max() == 0
    assert damping.rho is None
    assert loss.values == 0  # no trial of a step of zero


@pytest.mark.parametrize("steps", [18, 19])
def test_the_solvers_own_damping_is_chosen_every_so_many_steps(steps):
    loss, seen = problem(), []
    loop = LevenbergMarquardtLoop(DampingSchedule(tau=0.1, gamma=0.2))
    _, prepared, damping = loop.step(model_of(loss), newton(loss, seen), None, None, steps)
    gamma, w = 0.2 * abs(loss.start), 0.95**20
    assert [d for d, _ in seen] == pytest.approx([gamma] if steps == 18 else [gamma, gamma * w, gamma / w])
    # Of Newton's directions the least damped predicts the lowest loss.
    assert damping.gamma == pytest.approx(gamma if steps == 18 else gamma * w)
    assert prepared == damping.gamma


def test_the_floor_holds_the_damping():
    loss = problem()
    loop = LevenbergMarquardtLoop(DampingSchedule(tau=0.1, floor=0.5, every=1))
    damping = None
    for steps in range(40):
        _, _, damping = loop.step(model_of(loss), newton(loss), None, damping, steps)
    assert damping.tau == pytest.approx(0.05 * abs(loss.start))
    assert damping.trend.least == damping.trend.floor == pytest.approx(0.05 * abs(loss.start))


def test_rising_losses_raise_the_damping_and_drop_the_previous_step():
    loss = problem()
    loop = LevenbergMarquardtLoop(DampingSchedule(tau=0.1, floor=0.1, momentum=True, every=1))
    _, _, damping = loop.step(model_of(loss), newton(loss), None, None, 0)
    low = LossTrend(damping.trend.least, damping.trend.floor, 0.1 * loss.start, 0.1 * loss.start)
    damping = type(damping)(damping.tau, None, low, damping.rho)
    previous = [torch.ones(6).double()]
    d = -loss.gradient()  # no Newton direction, to which a second one could add nothing
    (delta,), _, after = loop.step(model_of(loss), along(d), previous, damping, 1)
    assert after.trend.floor == pytest.approx(4 * damping.tau)
    assert torch.linalg.vector_norm(delta - (delta @ d) / (d @ d) * d) < 1e-9  # along the new direction alone
