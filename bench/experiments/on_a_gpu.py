"""EigenAdam and tuned peers on a GPU: a transformer on characters and a ResNet on CIFAR-10, every run alone for the same seconds.

`python -m bench.experiments.on_a_gpu --data-dir DIR [--seconds 12] [--only characters]`

Peers have a learning rate from a grid, a warm-up of 100 steps and a cosine to zero over their seconds; EigenAdam has neither,
and once more with both. EigenAdam and AdamW have runs whose passes and steps are a CUDA graph. No weight decay. Evaluations do
not count. The characters are those of the standard library's modules: nothing is downloaded.
"""

import argparse
import json
import math
import platform
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secondorder as so
from bench import peers
from bench.data import cifar10
from bench.timing import RESULTS, cpu_name

WARM_UP = 100  # steps of a peer's schedule
REHEARSAL = 12  # steps before a run
QUEUED = 20  # steps between two looks at the clock
EVALUATIONS = 12
FIRST_STEPS = 6  # before one is captured
CONTEXT = 256  # characters
WIDTH = 384  # of the transformer


@dataclass
class Task:
    """What is trained: a model, its batches, the loss of one, and the losses of the training and the test set with a score."""

    data: str
    model: nn.Module
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    evaluate: Callable[[], tuple[float, float, float]]


class Block(nn.Module):
    """A transformer's, with the norms first."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, width))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    """Predicts the next character: [b, t] -> [b, t, classes]."""

    def __init__(self, classes: int, width: int, heads: int = 6, depth: int = 6):
        super().__init__()
        self.token, self.place = nn.Embedding(classes, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.token(tokens) + self.place(places))))


def characters(device: str, data_dir: Path | None, seed: int, batch: int = 64) -> Task:
    """Next characters of Python's standard library; its last tenth is the test set."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.tensor(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.long).clamp(max=127)
    classes, text = text.unique(return_inverse=True)
    text = text.to(device)
    train, test = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    model = Transformer(len(classes), WIDTH).to(device)

    def drawn(source: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(source) - CONTEXT - 1, (batch, 1), generator=generator, device=device)
        rows = source[starts + torch.arange(CONTEXT + 1, device=device)]
        return rows[:, :-1], rows[:, 1:]

    order = torch.Generator(device).manual_seed(seed)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            output = model(x)
        return F.cross_entropy(output.flatten(0, 1).float(), y.flatten())

    def evaluate() -> tuple[float, float, float]:
        fixed = torch.Generator(device).manual_seed(1_000_000)
        mean = [torch.stack([loss(*drawn(source, fixed)) for _ in range(10)]).mean().item() for source in (train, test)]
        return mean[0], mean[1], mean[1] / math.log(2)

    data = f"Python {platform.python_version()}'s standard library, {len(train):,} characters to train on, {len(test):,} to test"
    return Task(data, model, lambda: drawn(train, order), loss, evaluate)


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = (
            nn.Identity()
            if inputs == outputs
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


def resnet18() -> nn.Sequential:
    """ResNet-18 as it is made for images of 32 x 32."""
    widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        *(Residual(*each) for each in widths), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def resnet(device: str, data_dir: Path | None, seed: int, batch: int = 128) -> Task:
    """ResNet-18 on CIFAR-10, mirrored and shifted by up to four pixels at random."""
    assert data_dir is not None
    data = cifar10(data_dir)
    images = [x.view(-1, 3, 32, 32).to(device) for x in (data.train_x, data.test_x)]
    mean, std = images[0].mean((0, 2, 3), keepdim=True), images[0].std((0, 2, 3), keepdim=True)
    sets = [(x - mean) / std for x in images]
    targets = [y.to(device) for y in (data.train_y, data.test_y)]
    padded = F.pad(sets[0], (4, 4, 4, 4))
    model = resnet18().to(device, memory_format=torch.channels_last)
    order = torch.Generator(device).manual_seed(seed)
    n = len(padded)

    def augmented() -> Iterator[tuple[Tensor, Tensor]]:
        pixels = torch.arange(32, device=device)
        while True:
            for rows in torch.randperm(n, generator=order, device=device)[: n // batch * batch].view(-1, batch):
                top, left, flip = (torch.randint(k, (batch, 1), generator=order, device=device) for k in (9, 9, 2))
                columns = left + torch.where(flip == 1, 31 - pixels, pixels)
                image = padded[rows[:, None, None], :, (top + pixels)[:, :, None], columns[:, None, :]]
                yield image.permute(0, 3, 1, 2), targets[0][rows]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            output = model(x.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(output.float(), y)

    def evaluate() -> tuple[float, float, float]:
        model.eval()
        losses = [
            torch.stack([loss(x, y) for x, y in zip(xs[:8000].split(500), ys.split(500), strict=False)]).mean().item()
            for xs, ys in zip(sets, targets, strict=True)
        ]
        with torch.autocast(device, torch.bfloat16):
            right = sum((model(x).argmax(1) == y).sum() for x, y in zip(sets[1].split(500), targets[1].split(500), strict=True))
        model.train()
        return losses[0], losses[1], float(right) / len(targets[1])

    batches = augmented()
    name = f"{data.name}, {n:,} images to train on, {len(sets[1]):,} to test"
    return Task(name, model, lambda: next(batches), loss, evaluate)


TASKS: dict[str, Callable[[str, Path | None, int], Task]] = {"characters": characters, "resnet": resnet}


Rate = float | Tensor


@dataclass
class Method:
    """An optimizer by its learning rate, and the rates to choose from; without any it has no schedule either."""

    make: Callable[[nn.Module, Rate], torch.optim.Optimizer]
    rates: tuple[float, ...] = ()
    captured: bool = False  # whether its steps are replays of a CUDA graph; its rate is then a tensor


def adamw(model: nn.Module, lr: Rate) -> torch.optim.Optimizer:
    captured = isinstance(lr, Tensor)
    return torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0, fused=True, capturable=captured)


def sgd(model: nn.Module, lr: Rate) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, fused=True)


OWN = {
    "EigenAdam": Method(lambda model, lr: so.EigenAdam(model)),
    "EigenAdam with the schedule": Method(lambda model, lr: so.EigenAdam(model, lr), (1.0,)),
}
CAPTURED = {
    "EigenAdam with the schedule, CUDA graph": Method(lambda model, lr: so.EigenAdam(model, lr, capturable=True), (1.0,), True),
    "AdamW, CUDA graph": Method(adamw, (1e-3, 2e-3), True),
}
METHODS: dict[str, dict[str, Method]] = {
    "characters": OWN
    | {"AdamW": Method(adamw, (5e-4, 1e-3, 2e-3)), "Muon": Method(peers.muon, (1e-3, 3e-3)), "SOAP": Method(peers.soap, (3e-3,))}
    | CAPTURED,
    "resnet": OWN
    | {"AdamW": Method(adamw, (5e-4, 1e-3, 3e-3)), "SGD": Method(sgd, (0.03, 0.1, 0.3)), "SOAP": Method(peers.soap, (3e-3,))}
    | CAPTURED,
}


@dataclass
class Run:
    """One run and what it had come to at each evaluation."""

    task: str
    method: str
    lr: float | None
    seed: int
    data: str = ""
    steps: int = 0
    milliseconds: float = 0.0  # a step's mean
    seconds: list[float] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)


def factor(step: int, share: float) -> float:
    """Of the learning rate at a step, after this share of the seconds: it rises, and falls to zero as a cosine does."""
    return min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * min(1.0, share))) / 2


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Step:
    """One training step on a batch: forward, backward and the optimizer's own."""

    def __init__(self, task: Task, optimizer: torch.optim.Optimizer):
        self.task, self.optimizer = task, optimizer

    def __call__(self, *batch: Tensor) -> None:
        self.optimizer.zero_grad()
        self.task.loss(*batch).backward()
        self.optimizer.step()


class CapturedStep(Step):
    """After the first steps a replay of one CUDA graph, into whose inputs every batch is copied."""

    graph: torch.cuda.CUDAGraph | None = None
    made = 0

    def __call__(self, *batch: Tensor) -> None:
        if self.made < FIRST_STEPS:
            self.made += 1
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                super().__call__(*batch)
            torch.cuda.current_stream().wait_stream(stream)
            return
        if self.graph is None:
            self.inputs, self.graph = [x.clone() for x in batch], torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                super().__call__(*self.inputs)
        for x, new in zip(self.inputs, batch, strict=True):
            x.copy_(new)
        self.graph.replay()


def trained(task_name: str, name: str, lr: float | None, seed: int, seconds: float, device: str, data_dir: Path | None) -> Run:
    """Trains for these seconds, after some steps of another copy that make everything ready."""
    method, run = METHODS[task_name][name], Run(task_name, name, lr, seed)
    spent = due = 0.0

    def begun() -> Step:
        torch.manual_seed(seed)
        task = TASKS[task_name](device, data_dir, seed)
        rate = torch.tensor(lr, device=device) if method.captured else lr or 1.0
        return (CapturedStep if method.captured else Step)(task, method.make(task.model, rate))

    def advance(step: Step, steps: int) -> None:
        for k in range(steps):
            if lr is not None:
                rate = lr * factor(run.steps + k, spent / seconds)
                for group in step.optimizer.param_groups:
                    if method.captured:
                        group["lr"].fill_(rate)
                    else:
                        group["lr"] = rate
            step(*step.task.batch())
        wait(device)

    def evaluate(task: Task) -> None:
        with torch.no_grad():
            values = task.evaluate()
        for series, value in zip((run.seconds, run.train, run.test, run.score), (spent, *values), strict=True):
            series.append(value)

    advance(begun(), REHEARSAL)
    step = begun()
    run.data = step.task.data
    wait(device)
    while spent < seconds:
        begin = time.perf_counter()
        advance(step, QUEUED)
        spent += time.perf_counter() - begin
        run.steps += QUEUED
        if spent >= due and spent < seconds:
            due = spent + seconds / EVALUATIONS
            evaluate(step.task)
    evaluate(step.task)
    run.milliseconds = 1e3 * spent / run.steps
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--only", choices=TASKS)
    parser.add_argument("--methods", nargs="*", help="these alone; by default all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_training.json")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    machine = {"torch": torch.__version__, "CUDA": torch.version.cuda, "date": date.today().isoformat()}
    card = torch.cuda.get_device_name() if arguments.device == "cuda" else cpu_name()
    stored = json.loads(arguments.out.read_text())["runs"] if arguments.only and arguments.out.exists() else []
    runs = [run for run in stored if run["task"] != arguments.only]
    for task in [arguments.only] if arguments.only else TASKS:
        for name, method in METHODS[task].items():
            if arguments.methods and name not in arguments.methods:
                continue
            for lr in method.rates or (None,):
                if method.captured and arguments.device != "cuda":
                    continue
                run = trained(task, name, lr, 0, arguments.seconds, arguments.device, arguments.data_dir)
                runs.append(vars(run))
                report = {"card": card, **machine, "seconds": arguments.seconds, "runs": runs}
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")
                print(
                    f"{task} {name} {lr}: {run.steps} steps of {run.milliseconds:.1f} ms, "
                    f"loss {run.train[-1]:.4f}, test {run.test[-1]:.4f}, score {run.score[-1]:.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
