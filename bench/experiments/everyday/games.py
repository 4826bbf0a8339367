"""A game: a pole on a cart, by deep Q-learning."""

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bench.experiments.everyday.script import Script, evaluation
from bench.experiments.harness import Task

LONGEST = 200  # steps of an episode
DISCOUNT = 0.98


def begin(n: int, generator: torch.Generator) -> Tensor:
    """Carts and poles near their rest: position, velocity, angle, angular velocity [n, 4]."""
    return 0.1 * torch.rand(n, 4, generator=generator) - 0.05


def play(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """The states a fiftieth of a second after a push to the left (0) or right (1), and which poles have fallen [n]."""
    _, velocity, angle, spin = state.unbind(1)
    push = 20.0 * action - 10
    sin, cos = angle.sin(), angle.cos()
    # A cart of 1 kg and a pole of 0.1 kg, whose middle is half a metre away (Barto, Sutton and Anderson, 1983).
    force = (push + 0.05 * spin**2 * sin) / 1.1
    spin_rate = (9.8 * sin - cos * force) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    rate = force - 0.05 * spin_rate * cos / 1.1
    after = state + 0.02 * torch.stack([velocity, rate, spin, spin_rate], 1)
    return after, (after[:, 0].abs() > 2.4) | (after[:, 2].abs() > math.radians(12))


@torch.no_grad()
def mean_return(model: nn.Module) -> Tensor:
    """Steps that the greedy player keeps 16 poles up, on average."""
    state = begin(16, torch.Generator().manual_seed(0))
    up, steps = torch.ones(16), torch.zeros(16)
    for _ in range(LONGEST):
        state, fallen = play(state, model(state).argmax(1))
        up = up * ~fallen
        steps += up
    return steps.mean()


@torch.no_grad()
def experience(model: nn.Module, target: nn.Module, seed: int, players: int = 4, batch: int = 128) -> Iterator[tuple]:
    """Plays on by the model's values, now and then at random; batches of what was seen, with the values to learn."""
    generator = torch.Generator().manual_seed(seed)
    state, age = begin(players, generator), torch.zeros(players)
    memory = torch.zeros(20_000, 10)  # state, action, state after, fallen
    step = 0
    while True:
        action = model(state).argmax(1)
        bold = torch.rand(players, generator=generator) < max(0.05, 1 - step / 2000)
        action[bold] = torch.randint(2, (players,), generator=generator)[bold]
        after, fallen = play(state, action)
        rows = torch.arange(step * players, (step + 1) * players) % len(memory)
        memory[rows] = torch.cat([state, action[:, None], after, fallen[:, None]], 1)
        age += 1
        over = fallen | (age >= LONGEST)
        state, age = torch.where(over[:, None], begin(players, generator), after), age * ~over
        step += 1
        if step % 200 == 0:
            target.load_state_dict(model.state_dict())
        if step * players >= 400:
            known = memory[torch.randint(min(step * players, len(memory)), (batch,), generator=generator)]
            value = 1 + DISCOUNT * (1 - known[:, 9]) * target(known[:, 5:9]).amax(1)
            yield known[:, :4], known[:, 4].long(), value


def q_learning(seed: int) -> Task:
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    criterion = nn.SmoothL1Loss()

    def loss(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        state, action, value = batch
        return criterion(model(state).gather(1, action[:, None]).squeeze(1), value)

    def measure() -> tuple[Tensor, Tensor]:
        score = mean_return(model)
        return 1 - score / LONGEST, score

    played = experience(model, copy.deepcopy(model), seed)
    return Task("a pole on a cart", model, played, loss, evaluation(model, measure), 1.0, criterion)


SCRIPTS = [
    Script(
        "DQN", "4-64-64-2, ReLU, smooth L1, batch 128; the loss shown is the missing share of the longest game", q_learning,
        seconds=4, score_name="steps up, of 200", higher=True, noise=True,
    )
]  # fmt: skip
