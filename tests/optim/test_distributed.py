"""N ranks under DistributedDataParallel (gloo) against one process that has all their batches."""

import copy
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import secondorder as so
from secondorder._distributed import RankReducer, RankTerm
from secondorder.optim import _solving

OPTIMIZERS = {
    "EACG": lambda m, c: so.EACG(m, c, lr=0.1),
    "LayerwiseNewton": lambda m, c: so.LayerwiseNewton(m, c),
    "EACG-kfi": lambda m, c: so.EACG(m, c, lr=0.1, solver="kfi", curvature="gauss-newton"),
    "EACG-every": lambda m, c: so.EACG(m, c, lr=0.1, curvature_every=2),
    "EACG-empirical": lambda m, c: so.EACG(m, c, lr=0.1, curvature="fisher-empirical"),
    "KFAC": lambda m, c: so.KFAC(m, c, curvature="fisher-exact"),
    "KFRA": lambda m, c: so.KFRA(m, c),
    "KFLR": lambda m, c: so.KFLR(m, c),
    "KBFGS": lambda m, c: so.KBFGS(m, c),
    "KFRA-shared": lambda m, c: so.KFRA(m, c),  # each rank solves some of the layers
    "KFLR-shared": lambda m, c: so.KFLR(m, c),
    "LayerwiseNewton-shared": lambda m, c: so.LayerwiseNewton(m, c, inverse_every=1),
    "EACG-kfi-shared": lambda m, c: so.EACG(m, c, lr=0.1, solver="kfi"),
    "KBFGSL": lambda m, c: so.KBFGSL(m, c, memory=3),
}
FAILING = [name for name in OPTIMIZERS if name != "EACG-every"]  # whose second step records nothing that could fail
WARNING = ["EACG", "LayerwiseNewton"]
CRITERIA = {"cross-entropy": nn.CrossEntropyLoss, "eq14": so.criteria.BoundedClassificationLoss}
STEPS = 4


class Experts(nn.Module):
    """Every instance by one of three nets: often a rank has none for the last one, and now and then all have none."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)) for _ in range(3))

    def forward(self, x):
        chosen, z = (x[:, 0] > 0).long() + (x[:, 0] > 1.2), x.new_zeros(len(x), 3)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().squeeze(1)
            z = z.index_add(0, rows, expert(x[rows]))
        return z


def network(kind=False):
    torch.manual_seed(1)
    if kind == "experts":
        return Experts().double()
    if kind == "one layer":
        return nn.Sequential(nn.Linear(5, 3)).double()
    norm = kind
    layers = [nn.Linear(5, 7), nn.LayerNorm(7) if norm else nn.Tanh(), nn.Tanh(), nn.Linear(7, 4), nn.Mish(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).double()


def rank_batch(step, rank, m):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(m, 5, generator=generator).double(), torch.randint(3, (m,), generator=generator)


# How a step's batches are laid out: per rank, the micro-batches (instances, factor on the loss).
def even(ranks, rank):
    return [(6, 1.0)]


def uneven(ranks, rank):
    sizes = [3 + 4 * r for r in range(ranks)]
    return [(sizes[rank], sizes[rank] * ranks / sum(sizes))]


def means(ranks, rank):
    """As DDP has it where nothing is weighted: the mean of the ranks' means, each of its own number of instances."""
    return [(1 + 6 * rank, 1.0)]


def accumulated(ranks, rank):
    return [(4, 0.5), (4, 0.5)]


LAYOUTS = {"even": even, "uneven": uneven, "means": means, "no_sync": accumulated}


def micro_batches(layout, step, ranks, rank):
    return [(*rank_batch(step, 10 * rank + i, m), factor) for i, (m, factor) in enumerate(layout(ranks, rank))]


def rank_step(model, optimizer, batches):
    def closure():
        optimizer.zero_grad()
        for x, y, factor in batches[:-1]:
            with model.no_sync():
                (factor * optimizer.criterion(model(x), y)).backward()
        x, y, factor = batches[-1]
        loss = factor * optimizer.criterion(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)


def step_in_turn(model, optimizer, batches, ranks):
    """All ranks' batches in turn, each loss over their number."""

    def closure():
        optimizer.zero_grad()
        losses = [factor / ranks * optimizer.criterion(model(x), y) for x, y, factor in batches]
        for loss in losses:
            loss.backward()
        return sum(losses)

    optimizer.step(closure)


def union_step(model, optimizer, batches):
    """All ranks' batches as one: every instance counts alike in all layouts but "means"."""
    x, y = (torch.cat(parts) for parts in zip(*[(x, y) for x, y, _ in batches], strict=True))

    def closure():
        optimizer.zero_grad()
        loss = optimizer.criterion(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def cases():
    for name in OPTIMIZERS:
        for layout in LAYOUTS:
            yield name, layout, "cross-entropy", False
    for layout in LAYOUTS:
        yield "EACG", layout, "eq14", False
        yield "EACG", layout, "cross-entropy", True
    for name in ("EACG", "LayerwiseNewton", "EACG-kfi", "EACG-empirical", "KFLR", "KBFGS"):
        yield name, "even", "cross-entropy", "experts"
    for name in ("KFRA-shared", "EACG-kfi-shared"):  # fewer layers than ranks
        yield name, "even", "cross-entropy", "one layer"


def made(name, model, criterion):
    """A rank's optimizer, one "shared" so that its ranks share out what is far too little for that."""
    shared = name.endswith("shared")
    _solving.SHARED_FROM, _solving.SHARED_PER_NUMBER = (0.0, 0.0) if shared else (1e8, 100.0)
    return OPTIMIZERS[name](model, criterion)


def solved(rank):
    """How many layers a rank solves in a step of six, which of them, and whether a failure there is an error here."""
    torch.manual_seed(1)
    widths = [30, 20, 10, 5, 4, 3, 2]
    model = nn.Sequential(*(nn.Linear(n, p) for n, p in zip(widths, widths[1:])))
    optimizer = made("KFLR-shared", DistributedDataParallel(model), nn.CrossEntropyLoss())
    prepare, seen = optimizer._solver.prepare, []

    def counted(factors, scale, damping):
        seen.append(len(factors["input_second_moment"]))
        if seen[-1] == 20:
            raise KeyError("not solved")
        return prepare(factors, scale, damping)

    object.__setattr__(optimizer._solver, "prepare", counted)
    before, (x, y) = parameters(model), (torch.randn(6, 30), torch.randint(2, (6,)))
    optimizer.criterion(optimizer._called_model(x), y).backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return seen, str(error), torch.equal(parameters(model), before)
    return seen, "nothing", False


def worker(rank, ranks, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    results = {}
    for case in cases():
        name, layout, criterion, norm = case
        model = DistributedDataParallel(network(norm), find_unused_parameters=layout == "uneven")
        optimizer = made(name, model, CRITERIA[criterion]())
        for step in range(STEPS):
            rank_step(model, optimizer, micro_batches(LAYOUTS[layout], step, ranks, rank))
            if step == STEPS // 2 - 1:
                saved = copy.deepcopy((model.module.state_dict(), optimizer.state_dict()))
        results[case] = parameters(model), saved
    results["faults"] = {name: faults(name, rank, ranks) for name in FAILING}
    results["warned"] = {name: warned(name, rank, ranks) for name in WARNING}
    results["refused"] = refused(rank)
    results["in one process"] = in_one_process(rank)
    results["solved"] = solved(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def faults(name, rank, ranks):
    """What each rank raises where only the last one is at fault, and whether the training goes on."""
    raised, criterion = [], nn.CrossEntropyLoss()
    model = DistributedDataParallel(network())
    optimizer = made(name, model, criterion)
    rank_step(model, optimizer, micro_batches(even, 0, ranks, rank))
    before = parameters(model)
    culprit = rank == ranks - 1

    def nan(x, y):
        return criterion(model(x * float("nan") if culprit else x), y)

    def unrecorded(x, y):
        if culprit and name.startswith("KBFGS"):
            nan.calls = getattr(nan, "calls", 0) + 1
            if nan.calls == 2:
                raise KeyError("at the second call")
        return nn.functional.cross_entropy(model(x), y) if culprit else criterion(model(x), y)

    for loss in (nan, unrecorded):

        def closure(loss=loss):
            optimizer.zero_grad()
            value = loss(*rank_batch(1, rank, 6))
            value.backward()
            return value

        try:
            optimizer.step(closure)
            raised.append("nothing")
        except Exception as error:
            raised.append(f"{type(error).__name__}: {error}")
        raised.append(torch.equal(parameters(model), before))
    rank_step(model, optimizer, micro_batches(even, 2, ranks, rank))
    return [*raised, not torch.equal(parameters(model), before), bool(torch.isfinite(parameters(model)).all())]


def warned(name, rank, ranks):
    """What each rank raises where warnings are errors and only the last one's loss grows, and whether anything has changed."""
    model = DistributedDataParallel(network())
    optimizer = made(name, model, nn.MSELoss())
    for step, factor in enumerate([1.0, 1.0, 1e4 if rank == ranks - 1 else 1.0]):
        before, x = parameters(model), rank_batch(step, rank, 6)[0]

        def closure(x=x, factor=factor):
            optimizer.zero_grad()
            loss = optimizer.criterion(model(x), factor * x[:, :3])
            loss.backward()
            return loss

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ".*grown a thousandfold")
                optimizer.step(closure)
        except Exception as error:
            return str(error), torch.equal(parameters(model), before)
    return "nothing", False


def refused(rank):
    """The optimizer of a module that DistributedDataParallel calls without the optimizer's knowing."""
    inner = network()
    model = DistributedDataParallel(inner)
    optimizer = so.LayerwiseNewton(inner, nn.CrossEntropyLoss())
    x, y = rank_batch(0, rank, 4)
    optimizer.criterion(inner(x), y).backward()  # by itself it may be called
    optimizer.step()
    try:
        model(x)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def in_one_process(rank):
    """LevenbergMarquardt's steps of a net alone, and its error for the net in DistributedDataParallel."""
    inner = network()
    model, x = DistributedDataParallel(inner), rank_batch(0, rank, 4)[0]
    optimizer = so.LevenbergMarquardt(inner, race=False)
    before = parameters(model)
    try:
        optimizer.step(lambda: model(x).square().mean())
    except RuntimeError as error:
        message = str(error)
    unchanged = torch.equal(before, parameters(model))
    optimizer.step(lambda: inner(x).square().mean())
    return message, unchanged


@pytest.fixture(scope="module", params=[2, 3])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, args=(request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", list(cases()), ids=lambda case: "-".join(map(str, case)))
def test_ranks_equal_one_process(run, case):
    name, layout, criterion, norm = case
    ranks = len(run)
    for other in run[1:]:
        assert torch.equal(other[case][0], run[0][case][0])
    straight, resumed = network(norm), network(norm)
    resumed.load_state_dict(run[0][case][1][0])
    optimizers = [OPTIMIZERS[name](model, CRITERIA[criterion]()) for model in (straight, resumed)]
    optimizers[1].load_state_dict(run[0][case][1][1])
    for step in range(STEPS):
        batches = [b for rank in range(ranks) for b in micro_batches(LAYOUTS[layout], step, ranks, rank)]
        for model, optimizer in zip((straight, resumed), optimizers, strict=True):
            if model is resumed and step < STEPS // 2:
                continue
            if layout == "means":
                step_in_turn(model, optimizer, batches, ranks)
            else:
                union_step(model, optimizer, batches)
    assert (parameters(straight) - parameters(network(norm))).abs().max() > 1e-3
    for model in (straight, resumed):
        torch.testing.assert_close(run[0][case][0], parameters(model), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", FAILING)
def test_a_rank_that_fails_is_an_error_on_all(run, name):
    for rank, results in enumerate(run):
        nan, unchanged, other, still_unchanged, goes_on, finite = results["faults"][name]
        assert nan.startswith("NonFiniteError")
        assert unchanged and still_unchanged and goes_on and finite
        own = f"RuntimeError: {name.split('-')[0]}.step(): there are gradients, but no call of the criterion"
        own = "KeyError" if name.startswith("KBFGS") else own
        others = f"RuntimeError: the step has failed on rank {len(run) - 1}"
        assert other.startswith(own if rank == len(run) - 1 else others)


@pytest.mark.parametrize("name", WARNING)
def test_a_warning_that_is_an_error_on_a_rank_is_one_on_all(run, name):
    for rank, results in enumerate(run):
        error, unchanged = results["warned"][name]
        assert ("has grown a thousandfold" if rank == len(run) - 1 else f"the step has failed on rank {len(run) - 1}") in error
        assert unchanged


def test_ranks_share_out_the_solutions(run):
    """The largest layer is one rank's, the others' those of the other ranks; the failure of one is told on all."""
    solved = [results["solved"] for results in run]
    assert solved[0][0] == [30]
    assert sorted(width for seen, _, _ in solved for width in set(seen)) == [3, 4, 5, 10, 20, 30]
    failed = next(rank for rank, (seen, _, _) in enumerate(solved) if 20 in seen)
    for rank, (_, error, unchanged) in enumerate(solved):
        assert unchanged
        assert ("failed at layer '1': KeyError" if rank == failed else f"the step has failed on rank {failed}") in error


def test_an_optimizer_that_does_not_know_of_ddp(run):
    for results in run:
        assert "the model is called by DistributedDataParallel" in results["refused"]


def test_an_optimizer_of_one_process_refuses_ddp(run):
    for results in run:
        message, unchanged = results["in one process"]
        assert f"expected a net in one process, got one in DistributedDataParallel over {len(run)} of them" in message
        assert unchanged


def test_means_of_little_weight(tmp_path):
    """Rows count by their classes' weights, whose sum may be below 1."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        ranks = RankReducer(dist.group.WORLD, torch.device("cpu"))
        (mean, none) = ranks.average(lambda: [RankTerm("a", torch.tensor([3.0]), 0.02), RankTerm("b", torch.tensor([3.0]), 0.0)])
    finally:
        dist.destroy_process_group()
    assert (float(mean), float(none)) == pytest.approx((3.0, 0.0))


def test_fsdp_and_data_parallel_are_refused():
    class FullyShardedDataParallel(nn.Module):  # by its name: the real one needs an accelerator
        def __init__(self, module):
            super().__init__()
            self.module = module

    for wrapper in (FullyShardedDataParallel, nn.DataParallel):
        with pytest.raises(TypeError, match="FSDP's shards, and DataParallel's replicas, are not supported"):
            so.LayerwiseNewton(wrapper(network()), nn.CrossEntropyLoss())
