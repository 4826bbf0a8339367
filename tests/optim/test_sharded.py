"""EigenAdam under `fully_shard` (gloo): ranks are one process with all batches, what they exchange, checkpoints, refusals."""

import functools
import os
import warnings
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import secondorder as so

STEPS, SAVED, RANK = 12, 7, 4
ROWS = 24  # of all ranks' batches together
EVERY = StateDictOptions(full_state_dict=True)


class Net(nn.Module):
    """An embedding, a convolution, norms, linear layers with and without bias, a frozen one, and numbers by themselves."""

    def __init__(self):
        super().__init__()
        # All ranks together look up 120 of its rows in a step, 13 of them over and over.
        self.table = nn.Embedding(140, 11, _weight=torch.cat([torch.randn(13, 11), torch.zeros(127, 11)]))
        self.convolution = nn.Conv1d(11, 21, 3)
        self.block = nn.Sequential(nn.Linear(63, 30), nn.LayerNorm(30), nn.Tanh(), nn.Linear(30, 30, bias=False))
        self.frozen = nn.Linear(30, 12)
        self.short = nn.Linear(12, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.frozen.requires_grad_(False)

    def forward(self, x):
        h = torch.tanh(self.convolution(self.table(x).movedim(1, 2))).flatten(1)
        return self.short(torch.tanh(self.frozen(self.block(h)))) * self.scale


class NoLayers(nn.Module):
    """Parameters that no layer has: maps, a table that batches index, and numbers that all have the same gradient."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(40, 11))
        self.map, self.narrow_map = nn.Parameter(torch.randn(11, 21) / 4), nn.Parameter(torch.randn(21, 3) / 4)
        self.numbers = nn.ParameterList(torch.ones(shape) for shape in ((30, 12), (500, 11), (30, 3), (6, 11), (6, 4)))

    def forward(self, x):
        h = torch.tanh(self.table[x].mean(1) @ self.map) @ self.narrow_map
        for numbers in self.numbers:
            h = h * numbers.mean()
        return h


def network(dtype=torch.float64, kind=Net):
    torch.manual_seed(3)
    return kind().to(dtype)


def batch(step, rank=0, ranks=1):
    """A rank's share of a step's batch."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randint(13, (ROWS, 5), generator=generator), torch.randint(3, (ROWS,), generator=generator)
    return x.tensor_split(ranks)[rank], y.tensor_split(ranks)[rank]


def loss(z, y):
    """Of squares: no direction of the outputs has a gradient of rounding errors alone."""
    return nn.functional.mse_loss(z, nn.functional.one_hot(y, 3).to(z.dtype))


def sharded(mesh, dtype=torch.float64, ignored=False):
    """Blocks by themselves, two of them to be resharded after their forward pass, and the root."""
    model = network(dtype)
    for module in (model.block[0], model.block, model.short):
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh, ignored_params={model.scale} if ignored else None)


def train(model, optimizer, steps, rank=0, ranks=1):
    for step in steps:
        x, y = batch(step, rank, ranks)
        optimizer.zero_grad()
        loss(model(x), y).backward()
        if ranks > 1 and isinstance(model, Net) and not isinstance(model.scale, DTensor):  # ignored by fully_shard
            dist.all_reduce(model.scale.grad.div_(ranks))
        optimizer.step()


def whole(model):
    """All parameters, of all ranks."""
    return torch.cat([(p.full_tensor() if isinstance(p, DTensor) else p).detach().flatten() for p in model.parameters()])


def numbers(optimizer):
    """The metrics, and the largest root mean squares of gradients, which hardly show in the steps."""
    sizes = {f"size{i}": float(state["size"]) for i, state in enumerate(optimizer.state.values()) if "size" in state}
    return optimizer.metrics() | sizes


def without_hooks(optimizer):
    """As where layers run in a compiled graph."""
    optimizer.remove_hooks()
    return optimizer


MAKERS = {  # how an optimizer is made, of which parameters
    "model": lambda model: so.EigenAdam(model, rank=RANK, weight_decay=0.1),
    "parameters": lambda model: so.EigenAdam(model.parameters(), rank=RANK),
    "default": lambda model: so.EigenAdam(model),
    "unseen": lambda model: without_hooks(so.EigenAdam(model, rank=RANK)),
    "bounded": lambda model: so.EigenAdam(model, rank=RANK),
}
CASES = {  # by name and ranks: maker, dtype, mesh's dimensions, whether `scale` is a plain parameter
    ("model", 2): ("model", torch.float64, 1, False),
    ("model", 4): ("model", torch.float64, 1, False),
    ("parameters", 4): ("parameters", torch.float64, 1, False),
    ("default", 2): ("default", torch.float64, 1, False),
    ("float32", 2): ("model", torch.float32, 1, False),
    ("unseen", 2): ("unseen", torch.float64, 1, False),
    ("ignored", 2): ("model", torch.float64, 1, True),
    ("replicas", 4): ("model", torch.float64, 2, False),
    ("bounded", 4): ("bounded", torch.float64, 2, False),
}


def bound_of_means(maker):
    """Mean inputs are bounded as rows that the loss leaves out have it, though there are none."""
    return patch("secondorder.optim._eigen.step.LONGEST", 0.1 if maker == "bounded" else 5.0)


def collectives(step):
    """How many collectives a step has, other than all_reduce, and the numbers of each all_reduce."""
    sizes, others, originals = [], [], {}

    def counting(name, function):
        @functools.wraps(function)
        def counted(*args, **kwargs):
            sizes.append(args[0].numel()) if name == "all_reduce" else others.append(name)
            return function(*args, **kwargs)

        return counted

    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all", "broadcast"):
        originals[name] = getattr(dist, name)
        setattr(dist, name, counting(name, originals[name]))
    try:
        step()
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
    return others, sizes


def worker(rank, ranks, folder):
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="torch")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{ranks}", rank=rank, world_size=ranks)
    line = init_device_mesh("cpu", (ranks,))
    plane = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("copies", "rows"))
    results = {}
    for (case, wanted), (maker, dtype, dimensions, ignored) in CASES.items():
        if wanted != ranks:
            continue
        model = sharded(line if dimensions == 1 else plane, dtype, ignored)
        optimizer = MAKERS[maker](model)
        with warnings.catch_warnings(), bound_of_means(maker):
            if maker == "unseen":
                warnings.filterwarnings("ignore", message="secondorder: EigenAdam sees no inputs")
            train(model, optimizer, range(STEPS), rank, ranks)
        results[case] = whole(model), numbers(optimizer)
    results["exchanged"] = exchanged(line, rank, ranks)
    results["faults"] = faults(line, rank, ranks)
    results["refused"] = refused(line)
    results["checkpoints"] = checkpoints(line, rank, ranks, folder)
    results["no layers"] = without_layers(line, rank, ranks, folder)
    torch.save(results, f"{folder}/{ranks}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def exchanged(mesh, rank, ranks):
    model = sharded(mesh)
    optimizer = MAKERS["model"](model)
    train(model, optimizer, range(10), rank, ranks)
    found = []
    for step in range(10, 13):  # the first of them renews bases
        x, y = batch(step, rank, ranks)
        optimizer.zero_grad()
        loss(model(x), y).backward()
        found.append(collectives(optimizer.step))
    return found


def faults(mesh, rank, ranks):
    """What a rank raises when only the last one has NaN in its batch, whether all has stayed, and whether training goes on."""
    model = sharded(mesh)
    optimizer, found = MAKERS["model"](model), []
    for before, kept in ((range(6), 6), (range(7, 10), 10)):  # a step that keeps bases and one that renews them
        train(model, optimizer, before, rank, ranks)
        before, states = whole(model), snapshot(optimizer)
        x, y = batch(kept, rank, ranks)
        optimizer.zero_grad()
        (loss(model(x), y) * (float("nan") if rank == ranks - 1 else 1.0)).backward()
        if rank != ranks - 1:  # gradients are averages: of what comes to the other ranks, too, NaN is left on the last one alone
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.to_local().nan_to_num_(0.1)
        elif kept == 10:  # a vector's alone
            for p in model.parameters():
                if p.grad is not None and p is not model.block[1].weight:
                    p.grad.to_local().nan_to_num_(0.1)
        try:
            optimizer.step()
            found.append("nothing")
        except so.NonFiniteError as error:
            found.append(str(error))
        found.append(torch.equal(whole(model), before) and same(snapshot(optimizer), states))
        train(model, optimizer, [kept], rank, ranks)
        found.append(bool(whole(model).isfinite().all()) and not torch.equal(whole(model), before))
    return found, optimizer.skipped_steps


def snapshot(optimizer):
    """All tensors of the state but control, which counts what is refused."""
    return [
        (value.to_local() if isinstance(value, DTensor) else value).clone()
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name != "control"
    ]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def refused(mesh):
    """What optimizers say of shards."""
    criterion, said = nn.CrossEntropyLoss(), {}

    def by(name, make):
        try:
            make()
            said[name] = "nothing"
        except (TypeError, ValueError) as error:
            said[name] = f"{type(error).__name__}: {error}"

    for i, name in enumerate(("EACG", "LayerwiseNewton", "KFAC", "KFRA", "KFLR", "KBFGS", "KBFGSL")):
        model = fully_shard(nn.Sequential(nn.Linear(4, 4)), mesh=mesh)
        if i % 2:  # after a forward pass the parameters are whole ones for a while
            model(torch.randn(2, 4))
        by(name, lambda name=name, model=model: getattr(so, name)(model, criterion))
    by("LevenbergMarquardt", lambda: so.LevenbergMarquardt(fully_shard(nn.Linear(4, 4), mesh=mesh).parameters()))
    columns = nn.Linear(4, 4)
    columns.weight = nn.Parameter(distribute_tensor(columns.weight.detach(), mesh, [Shard(1)]))
    by("columns", lambda: so.EigenAdam(columns))
    by("curvature", lambda: so.EigenAdam(sharded(mesh), curvature="pch-abs", criterion=criterion))
    return said


def checkpoints(mesh, rank, ranks, folder):
    """2 ranks save, in both ways; 2 and 4 load, and 2 from one process."""
    path, results = f"{folder}/checkpoint", {}
    model = sharded(mesh)
    optimizer = MAKERS["model"](model)
    if ranks == 2:
        train(model, optimizer, range(SAVED), rank, ranks)
        saved_by_dcp(model, optimizer, path)
        full = get_model_state_dict(model, options=EVERY), get_optimizer_state_dict(model, optimizer, options=EVERY)
        if rank == 0:
            torch.save(full, f"{folder}/full.pt")
        flat = torch.load(f"{folder}/plain.pt")  # of one process
        model = sharded(mesh)
        optimizer = MAKERS["model"](model)
        set_model_state_dict(model, flat[0], options=EVERY)
        with torch.no_grad():
            model(batch(0)[0])  # the root's parameters are whole then
        optimizer.load_state_dict(flat[1])
        train(model, optimizer, range(SAVED, STEPS), rank, ranks)
        results["from one"] = whole(model)
        model = sharded(mesh)
        optimizer = MAKERS["model"](model)
    loaded_by_dcp(model, optimizer, path)
    train(model, optimizer, range(SAVED, STEPS), rank, ranks)
    results["continued"] = whole(model)
    return results


def saved_by_dcp(model, optimizer, path):
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=path)


def loaded_by_dcp(model, optimizer, path):
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def without_layers(mesh, rank, ranks, folder):
    """2 ranks save what the first gradients have shown to be maps or not; 2 and 4 load."""
    path = f"{folder}/without_layers"
    for steps in (range(SAVED), range(SAVED, STEPS)) if ranks == 2 else (range(SAVED, STEPS),):
        model = fully_shard(network(kind=NoLayers), mesh=mesh)
        optimizer = MAKERS["model"](model)
        if steps.start:
            loaded_by_dcp(model, optimizer, path)
        train(model, optimizer, steps, rank, ranks)
        if not steps.start:
            saved_by_dcp(model, optimizer, path)
            full = get_model_state_dict(model, options=EVERY), get_optimizer_state_dict(model, optimizer, options=EVERY)
            if rank == 0:
                torch.save(full, f"{folder}/without_layers.pt")
    return whole(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def ranks_of(folder):
    """The results of 2 and of 4 ranks, the second of which go on from a checkpoint of the first."""
    model = network()
    optimizer = MAKERS["model"](model)
    train(model, optimizer, range(SAVED))
    torch.save((model.state_dict(), optimizer.state_dict()), folder / "plain.pt")
    for ranks in (2, 4):
        torch.multiprocessing.spawn(worker, args=(ranks, str(folder)), nprocs=ranks)
    return {ranks: [torch.load(folder / f"{ranks}-{rank}.pt") for rank in range(ranks)] for ranks in (2, 4)}


def alone(maker, dtype=torch.float64):
    model = network(dtype)
    optimizer = so.EigenAdam(model, rank=16) if maker == "default" else MAKERS[maker](model)
    with bound_of_means(maker):
        train(model, optimizer, range(STEPS))
    return whole(model), numbers(optimizer)


@pytest.mark.filterwarnings("ignore:secondorder. EigenAdam sees no inputs")
@pytest.mark.parametrize(("case", "ranks"), CASES)
def test_shards_equal_one_process(ranks_of, ranks, case):
    maker, dtype, _, _ = CASES[case, ranks]
    expected, metrics = alone(maker, dtype)
    exact = dtype == torch.float64
    atol = 1e-8 if exact else 2e-5 if so.build_info()["extension"] else 1e-4
    for result in ranks_of[ranks]:
        assert torch.equal(result[case][0], ranks_of[ranks][0][case][0])
        torch.testing.assert_close(result[case][0], expected, rtol=1e-6 if exact else 2e-4, atol=atol)
        shared = {name: value for name, value in metrics.items() if name != "captured"}
        assert {name: result[case][1][name] for name in shared} == pytest.approx(shared, rel=1e-6 if exact else 1e-3)
        assert 0.0 < result[case][1]["captured"] <= 1.0
    assert (expected - whole(network(dtype))).abs().max() > 1e-2


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_is_exchanged(ranks_of, ranks):
    """Two sums a step and six where bases are renewed, of k numbers for each row and column; never a whole weight."""
    sides = [(21, 33), (30, 63), (30, 30), (3, 12)]
    few = sum((RANK + 1) * (n + p) for n, p in sides) + 13 * 11 + 100
    for result in ranks_of[ranks]:
        for (others, sizes), bound in zip(result["exchanged"], (6, 2, 2), strict=True):
            assert not others and len(sizes) == bound
            assert max(sizes) < 2 * few


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_with_nan_refuses_the_step_of_all(ranks_of, ranks):
    for result in ranks_of[ranks]:
        found, skipped = result["faults"]
        assert skipped == 2
        for said, stayed, goes_on in (found[:3], found[3:]):
            assert "expected finite gradients" in said
            assert stayed and goes_on


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_checkpoint_of_two_ranks_goes_on(ranks_of, ranks):
    expected, _ = alone("model")
    for result in ranks_of[ranks]:
        for way, values in result["checkpoints"].items():
            torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-8, msg=way)


def test_a_full_checkpoint_goes_on_in_one_process(ranks_of, folder):
    model = network()
    optimizer, (weights, state) = MAKERS["model"](model), torch.load(folder / "full.pt")
    model.load_state_dict(weights)
    set_optimizer_state_dict(model, optimizer, state)
    train(model, optimizer, range(SAVED, STEPS))
    torch.testing.assert_close(whole(model), alone("model")[0], rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_says_what_is_no_map(ranks_of, folder):
    """Of one process and of shards, by torch.distributed.checkpoint into a new optimizer, and whole."""
    straight = network(kind=NoLayers)
    optimizer = MAKERS["model"](straight)
    train(straight, optimizer, range(SAVED))
    assert [len(optimizer.state[p]["basis_in"]) > 0 for p in straight.parameters()] == [False, True, True, *[False] * 5]
    saved_by_dcp(straight, optimizer, folder / "alone")
    train(straight, optimizer, range(SAVED, STEPS))
    for way in ("alone", "whole"):
        model = network(kind=NoLayers)
        optimizer = MAKERS["model"](model)
        if way == "alone":
            loaded_by_dcp(model, optimizer, folder / "alone")
        else:
            weights, state = torch.load(folder / "without_layers.pt")
            model.load_state_dict(weights)
            set_optimizer_state_dict(model, optimizer, state)
        train(model, optimizer, range(SAVED, STEPS))
        tight = {"rtol": 0, "atol": 0} if way == "alone" else {"rtol": 1e-6, "atol": 1e-8}
        torch.testing.assert_close(whole(model), whole(straight), **tight, msg=way)
    for ranks, results in ranks_of.items():
        for result in results:
            torch.testing.assert_close(result["no layers"], whole(straight), rtol=1e-6, atol=1e-8, msg=f"{ranks} ranks")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("rank", [None, 16])
def test_a_rank_that_is_given_is_that_of_every_checkpoint(rank, tmp_path):
    """In one process layers that see 256 inputs have bases of 16 directions, and those of a new optimizer 8."""
    saving, loading = nn.Linear(40, 50), nn.Linear(40, 50)
    one, other = so.EigenAdam(saving, rank=rank), so.EigenAdam(loading, rank=rank)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 256 * 40).sin().view(256, 40)).square().mean().backward()
        optimizer.step()

    step(saving, one)
    saved_by_dcp(saving, one, tmp_path)
    if rank is None:
        with pytest.raises(CheckpointException, match="Size mismatch"):
            loaded_by_dcp(loading, other, tmp_path)
        return
    loaded_by_dcp(loading, other, tmp_path)
    step(saving, one)
    step(loading, other)
    assert torch.equal(whole(saving), whole(loading))


@pytest.mark.parametrize("ranks", [2, 4])
def test_others_refuse_shards(ranks_of, ranks):
    for result in ranks_of[ranks]:
        said = result["refused"]
        assert "'weight' of placements (Shard(dim=1),)" in said.pop("columns")
        assert "expected curvature='gradient' with DTensor parameters" in said.pop("curvature")
        for name, words in said.items():
            assert words.startswith(f"TypeError: {name}: expected whole parameters on every rank") and "EigenAdam" in words
