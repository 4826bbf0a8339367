"""Whole training steps, zero_grad to step: this package's optimizers against torch's, plain PyTorch and BackPACK's passes."""

import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import secondorder as so
from bench import peers
from bench.literal import LiteralEACG
from bench.micro.nets import NETS, Net
from bench.timing import interleaved, report

BASELINE = "SGD, momentum"
SMALL = {"digits": [100], "cifar": [100, 1000], "autoencoder": [1000], "pinn": [128], "tabular": [128]}
LARGE = {"imagenet": [100], "autoencoder": [100], "pinn": [1000], "tabular": [1000]}
EVERY = 10  # of what is renewed every so many steps

Make = Callable[[nn.Module, nn.Module], torch.optim.Optimizer]

# lr is tiny: a benchmark's random targets must not let anything diverge.
TORCH: dict[str, Make] = {
    BASELINE: lambda m, c: torch.optim.SGD(m.parameters(), lr=1e-6, momentum=0.9),
    "Adam": lambda m, c: torch.optim.Adam(m.parameters(), lr=1e-6),
    "Adam, fused": lambda m, c: torch.optim.Adam(m.parameters(), lr=1e-6, fused=True),
}
if hasattr(torch.optim, "Muon"):
    TORCH["Muon"] = lambda m, c: peers.muon(m, 1e-6)
EIGEN: dict[str, Make] = {"EigenAdam": lambda m, c: so.EigenAdam(m, lr=1e-4)}  # its own learning rate times this
SOAP: dict[str, Make] = {"SOAP": lambda m, c: peers.soap(m, 1e-6)}
RENEWING = {*EIGEN, *SOAP}  # what has a basis, renewed every fifth or tenth step
EACGS: dict[str, Make] = {
    "EACG": lambda m, c: so.EACG(m, c, 1e-6),
    "EACG, momentum=0": lambda m, c: so.EACG(m, c, 1e-6, momentum=0),
    "EACG, the paper's settings": lambda m, c: so.EACG(
        m, c, 1e-6, solver="ea-cg-truncated", max_cg=20, eps_cg=0, momentum=0, factor_decay=0, max_step=None
    ),
    "EACG, curvature_every=10": lambda m, c: so.EACG(m, c, 1e-6, curvature_every=EVERY),
    "EACG, curvature_samples=100": lambda m, c: so.EACG(m, c, 1e-6, curvature_samples=100),
}


def amortised(curvature: str, solver: str) -> Make:
    """Factors and inverses every tenth step."""
    return lambda m, c: so.EACG(
        m, c, 1e-6, curvature=curvature, solver=solver, curvature_every=EVERY, inverse_every=EVERY, max_factor_elements=2**22
    )


KFI: dict[str, Make] = {
    "KFRA, every 10": lambda m, c: so.EACG(
        m, c, 1e-6, curvature="gauss-newton", solver="kfi", curvature_every=EVERY, inverse_every=EVERY
    ),
    "KFAC, every 10": lambda m, c: so.EACG(
        m, c, 1e-6, curvature="fisher-mc", solver="kfi", curvature_every=EVERY, inverse_every=EVERY
    ),
    "KFRA, every 10, rank one for n_in > 2048": amortised("gauss-newton", "kfi"),
}
CLOSURES: dict[str, Make] = {
    "LBFGS": lambda m, c: torch.optim.LBFGS(m.parameters(), lr=1e-6, max_iter=1, history_size=10),
    "K-BFGS": lambda m, c: so.KBFGS(m, c, lr=1e-6),
}


def stepper(net: Net, batch: int, make: Make) -> Callable[[], object]:
    """An ordinary training loop's step."""
    model, criterion, (x, y) = net.model(), net.criterion(), net.batch(batch)
    optimizer = make(model, criterion)

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    def step() -> None:
        evaluate()
        optimizer.step()

    takes_closure = isinstance(optimizer, torch.optim.LBFGS | so.KBFGS)
    return partial(optimizer.step, evaluate) if takes_closure else step


def backpack_pass(net: Net, batch: int, extension: str) -> Callable[[], object]:
    """A forward and backward pass with a curvature of BackPACK's, and nothing done with it."""
    import backpack

    model, criterion, (x, y) = backpack.extend(net.model()), backpack.extend(net.criterion()), net.batch(batch)
    options = {"modify": "abs"} if extension == "PCHMP" else {}

    def step() -> None:
        model.zero_grad()
        with backpack.backpack(getattr(backpack.extensions, extension)(**options)):
            criterion(model(x), y).backward()

    return step


def functions(net: Net, batch: int, everything: bool, compiled: bool) -> dict[str, Callable[[], object]]:
    """All that are compared on a net."""
    makes = TORCH | EIGEN | EACGS | (SOAP | KFI | CLOSURES if everything else {})
    found = {name: stepper(net, batch, make) for name, make in makes.items()}
    if everything and (net.activation, net.criterion) == (nn.Sigmoid, nn.CrossEntropyLoss):
        x, y = net.batch(batch)
        for name, compile in [("the paper's EA-CG, plain PyTorch", False), ("the same, recursion by torch.compile", True)]:
            if not compile or compiled:
                found[name] = partial(LiteralEACG(net.model(), 1e-6, 0.01, 20, 0.0, compiled=compile).step, x, y)
    if everything and net.criterion is nn.CrossEntropyLoss and importlib.util.find_spec("backpack"):
        found |= {f"BackPACK, {e} pass alone": backpack_pass(net, batch, e) for e in ("KFRA", "KFAC", "PCHMP")}
    return found


def main(
    large: Annotated[bool, typer.Option(help="The nets and batches that take long, too, and the ImageNet-10 net.")] = False,
    compiled: Annotated[bool, typer.Option(help="Plain PyTorch under torch.compile, too.")] = True,
    rounds: Annotated[int, typer.Option(help="Turns that each function takes; four times as many on the small nets.")] = 5,
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(NETS)} these nets alone.")] = None,
) -> None:
    """Measures training steps and stores bench/results/step_NET_BATCH.json."""
    warnings.filterwarnings("ignore", message="Full backward hook")
    for name, batch in [(n, b) for shapes in ([SMALL, LARGE] if large else [SMALL]) for n, each in shapes.items() for b in each]:
        if only and name not in only:
            continue
        net = NETS[name]
        compared = functions(net, batch, name != "imagenet", compiled)
        periods = {each: EVERY for each in compared if each in RENEWING or ("every" in each and "10" in each)}
        rows = interleaved(compared, BASELINE, 4 * rounds if name in ("digits", "pinn", "tabular") else rounds, periods)
        report(
            f"step_{name}_{batch}",
            f"Training step, {net}, batch {batch}, float32, {torch.get_num_threads()} threads",
            rows,
            "Ratio: to SGD with momentum, median over rounds. What is done every fifth or tenth step is averaged over ten.",
        )


if __name__ == "__main__":
    typer.run(main)
