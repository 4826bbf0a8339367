"""EigenAdam on models as people write them: what it finds in them, and what it keeps."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers.captures import capturing
from helpers.eigen import batch, network, train, values
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

import secondorder as so
from secondorder.optim._eigen.layer_inputs import input_rows
from secondorder.optim._eigen.matrices import find_matrices


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.place = nn.Parameter(torch.randn(1, 6, 16) * 0.1)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x) + self.place).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 12, batch_first=True)
        self.gru = nn.GRU(12, 9, batch_first=True)
        self.head = nn.Linear(9, 3, bias=False)

    def forward(self, x):
        return self.head(self.gru(self.lstm(x)[0])[0][:, -1])


class Functional(nn.Module):
    """Weights that no module multiplies, one of them used twice; a layer called twice; a scalar."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(25, 25) / 5) for _ in range(2))
        self.shared, self.head, self.scale = nn.Linear(25, 25), nn.Linear(25, 3), nn.Parameter(torch.ones(()))

    def forward(self, x):
        x = torch.tanh(F.linear(x, self.first) @ self.second @ self.second)
        return self.scale * self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


def images(model):
    return model, lambda seed: (batch(seed, 16, torch.float32)[0][:, None].repeat(1, 4, 1).view(16, 4, 5, 5), batch(seed, 16)[1])


def tokens(seed):
    x, y = batch(seed, 16)
    return (x[:, :6] * 10).long().abs() % 30, y


MODELS = {
    "no bias": lambda: (nn.Sequential(nn.Linear(25, 30, bias=False), nn.ReLU(), nn.Linear(30, 3, bias=False)), None),
    "sequence": lambda: (
        nn.Sequential(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 4), nn.Flatten(), nn.Linear(20, 3)),
        lambda seed: (batch(seed, dtype=torch.float32)[0].view(-1, 5, 5), batch(seed)[1]),
    ),
    "convolutions": lambda: images(
        nn.Sequential(
            nn.Conv2d(4, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)
        )
    ),
    "transposed": lambda: images(
        nn.Sequential(
            nn.Conv2d(4, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(216, 3)
        )
    ),
    "attention": lambda: (Attention(), tokens),
    "recurrent": lambda: (Recurrent(), lambda seed: (batch(seed, dtype=torch.float32)[0].view(-1, 5, 5), batch(seed)[1])),
    "functional": lambda: (Functional(), None),
    "weight norm": lambda: (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(25, 30)), nn.Tanh(), nn.Linear(30, 3)),
        None,
    ),
    "linear": lambda: (nn.Linear(25, 3), None),
}


@pytest.mark.parametrize("given", ["model", "parameters", "parameters and model"])
@pytest.mark.parametrize("name", MODELS)
def test_any_model_trains(name, given):
    torch.manual_seed(0)
    model, data = MODELS[name]()
    data = data or (lambda seed: batch(seed, dtype=torch.float32))
    make = {
        "model": lambda: so.EigenAdam(model),
        "parameters": lambda: so.EigenAdam(model.parameters()),
        "parameters and model": lambda: so.EigenAdam([{"params": list(model.parameters())}], model=model),
    }
    optimizer = make[given]()
    losses = []
    for seed in range(40):
        x, y = data(seed % 4)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert torch.isfinite(values(model)).all()


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, bias=False),
        nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), groups=2, bias=False),
        nn.Conv2d(4, 6, (5, 3), padding="same", dilation=(1, 2), bias=False),
        nn.Conv3d(4, 6, 2, padding="valid", bias=False),
    ],
    ids=str,
)
def test_rows_of_a_convolution_are_its_patches(module):
    """All outputs, evenly spread or each once, are the rows times the weight."""
    module = module.double()
    x = torch.randn(3, 4, *[7, 8, 5][: len(module.kernel_size)], dtype=torch.float64)
    rows = input_rows(module, x)
    output = module(x).movedim(1, -1).reshape(-1, module.groups, 6 // module.groups)
    weight = module.weight.reshape(module.groups, 6 // module.groups, -1)
    product = torch.einsum("mgp,gnp->mgn", rows.view(-1, module.groups, rows.shape[1]), weight)
    torch.testing.assert_close(product, output[torch.arange(len(product)) * len(output) // len(product)])


@pytest.mark.parametrize(("batch", "length"), [(64, 256), (4096, 1), (4096, 3), (200, 100), (900, 15)])
def test_the_inputs_of_many_are_spread(batch, length):
    """At most 4,096 of a linear layer's: evenly, and of every place in a sequence alike."""
    index = torch.arange(batch * length).view(batch, length, 1).expand(-1, -1, 2)
    rows = input_rows(nn.Linear(2, 3), index)[:, 0]
    assert min(4096, batch * length) / 3 < len(rows) <= 4096
    assert len(set(rows.diff().tolist())) == 1
    if batch * length <= 4096:
        assert len(rows) == batch * length
    counts = torch.bincount(rows % length, minlength=length)
    assert counts.max() - counts.min() <= 1


class ByName(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(input=x)
        return x


def test_inputs_given_by_name_are_those_by_position():
    runs = []
    for chain in (lambda layers: nn.Sequential(*layers), ByName):
        torch.manual_seed(0)
        model = chain([nn.Embedding(30, 6), nn.Flatten(), nn.Linear(36, 12), nn.Unflatten(1, (3, 4)), nn.Conv1d(3, 5, 2),
                       nn.Flatten(), nn.Linear(15, 3)])  # fmt: skip
        optimizer = so.EigenAdam(model)
        for seed in range(7):
            x, y = tokens(seed)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert optimizer.metrics()["seen"] == 1
        copy.deepcopy(model)(x)  # whose hooks do nothing
        runs.append(values(model))
    assert torch.equal(*runs)


def test_patches_of_fake_tensors_leave_nothing_behind():
    conv, x = nn.Conv2d(2, 3, 3), torch.randn(2, 2, 6, 7)
    with FakeTensorMode() as mode:
        assert input_rows(conv, mode.from_tensor(x)).shape == (40, 18)
    assert type(input_rows(conv, x)) is torch.Tensor
    with FakeTensorMode() as mode:
        assert input_rows(conv, mode.from_tensor(x)).shape == (40, 18)


def test_a_dry_run_does_not_decide_how_many_directions_a_layer_has():
    made = []
    for rows in ((300,), (1, 300)):  # of the calls before the first step
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 2)).double()
        optimizer = so.EigenAdam(model)
        for m in rows:
            loss = model(torch.randn(m, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).square().mean()
        loss.backward()
        optimizer.step()
        made.append([optimizer.state[layer.weight] for layer in model[::2]])
        assert [[len(state["basis_out"]), len(state["basis_in"])] for state in made[-1]] == [[16, 9], [16, 16], [2, 16]]
        model(torch.randn(2, 9, dtype=torch.float64)).square().mean().backward()  # few inputs change nothing any more
        optimizer.step()
        assert len(optimizer.state[model[2].weight]["basis_in"]) == 16
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(one["mean"], other["mean"])


def test_what_is_found_in_a_model():
    """Without it every matrix stands alone; with it layers have their biases, and tables and norms are no matrices."""
    found = {matrix.name: matrix for matrix in find_matrices(Attention().parameters(), None)}
    assert all(matrix.bias is None for matrix in found.values())
    model = Attention()
    found = {matrix.name: matrix for matrix in find_matrices(model.parameters(), model)}
    assert found["head.weight"].bias is model.head.bias
    assert found["encoder.linear1.weight"].has_bases
    assert found["encoder.self_attn.in_proj_weight"].has_bases
    assert not found["encoder.self_attn.in_proj_weight"].layers
    assert not found["embed.weight"].has_bases
    assert not found["encoder.norm1.weight"].has_bases
    assert "head.bias" not in found


def test_a_compiled_layer_is_told_of_once():
    model = network(torch.float32)
    optimizer = so.EigenAdam(model)
    optimizer.remove_hooks()
    with pytest.warns(UserWarning, match="sees no inputs of 0.weight, 2.weight, 4.weight") as caught:
        losses = train(model, optimizer, range(60), dtype=torch.float32)
    assert len(caught) == 1
    assert losses[-1] < losses[0]


def test_where_warnings_are_errors_a_step_that_warns_changes_nothing():
    model, x = network(), torch.randn(9, 25).double()
    optimizer = so.EigenAdam(model)
    optimizer.remove_hooks()
    model(x).square().mean().backward()
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="sees no inputs of"):
        warnings.simplefilter("error")
        optimizer.step()
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    optimizer.step()
    assert optimizer.state[model[0].weight]["renewals"] == 2


def test_a_layer_that_shows_no_inputs_any_more_goes_on_from_its_gradients():
    """At first its basis stays, so that one forward pass in between does no harm; after some renewals a warning says so."""
    model = network(torch.float32)
    optimizer = so.EigenAdam(model)
    train(model, optimizer, range(10), dtype=torch.float32)
    optimizer.remove_hooks()
    before, scale = (optimizer.state[model[0].weight][key].clone() for key in ("basis_in", "scale_in"))
    train(model, optimizer, range(10, 20), dtype=torch.float32)
    torch.testing.assert_close(optimizer.state[model[0].weight]["basis_in"], before)
    with pytest.warns(UserWarning, match="sees no inputs of 0.weight, 2.weight, 4.weight"):
        train(model, optimizer, range(20, 60), dtype=torch.float32)
    assert (optimizer.state[model[0].weight]["basis_in"] - before).abs().max() > 0.01
    assert optimizer.state[model[0].weight]["scale_in"].max() < 0.1 * scale.max()  # the gradients' own


def test_layers_that_are_pruned_later_are_told_of_once_and_go_on():
    model = network(torch.float32)
    optimizer = so.EigenAdam(model)
    train(model, optimizer, range(10), dtype=torch.float32)
    prune.random_unstructured(model[0], "weight", 0.3)
    with pytest.warns(
        UserWarning, match="sees no inputs of 0.weight: .* have been pruned, parametrized or given another forward"
    ) as caught:
        losses = train(model, optimizer, range(10, 60), dtype=torch.float32)
    assert len(caught) == 1
    assert losses[-1] < losses[0]
    prune.remove(model[0], "weight")
    train(model, optimizer, range(60, 65), dtype=torch.float32)
    assert optimizer.state[model[0].weight]["unseen"] == 0


def test_gradients_that_are_estimated_under_no_grad_are_told_of():
    """An evolution strategy goes through the model without autograd, and writes p.grad itself."""
    model = network()
    optimizer = so.EigenAdam(model)
    x, parameters = torch.randn(9, 25).double(), list(model.parameters())

    @torch.no_grad()
    def step():
        noise = [0.01 * torch.randn_like(p) for p in parameters]
        before = model(x).square().mean()
        torch._foreach_add_(parameters, noise)
        change = model(x).square().mean() - before
        torch._foreach_sub_(parameters, noise)
        for p, z in zip(parameters, noise, strict=True):
            p.grad = change * z
        optimizer.step()

    step()  # at the first, a lazy layer has shown no inputs
    with pytest.warns(UserWarning, match="sees no inputs of 0.weight, .* or torch.no_grad"):
        step()
    assert optimizer.metrics()["seen"] == 0


def test_transforms_of_the_model_are_left_alone():
    model = network()
    optimizer = so.EigenAdam(model)
    x, _ = batch()
    for _ in range(2):
        slopes = torch.vmap(torch.func.grad(lambda row: model(row).sum()))(x)
        hessians = torch.vmap(torch.func.hessian(lambda row: model(row).sum()))(x[:2])
        assert slopes.shape == (32, 25)
        assert hessians.shape == (2, 25, 25)
        train(model, optimizer, [0])


@pytest.mark.parametrize("change", ["prune", "spectral norm", "no rows", "nested"])
def test_forward_passes_that_show_nothing(change):
    model = network(torch.float32)
    optimizer = so.EigenAdam(model)
    train(model, optimizer, range(3), dtype=torch.float32)
    if change == "prune":
        prune.l1_unstructured(model[2], "weight", amount=0.3)
    elif change == "spectral norm":
        nn.utils.parametrizations.spectral_norm(model[2])
    elif change == "no rows":
        assert model(torch.zeros(0, 25)).shape == (0, 3)
    else:
        layer = nn.Linear(25, 4)
        so.EigenAdam(layer)
        assert layer(torch.nested.nested_tensor([torch.ones(2, 25), torch.ones(3, 25)], layout=torch.jagged)).requires_grad
    train(model, optimizer, range(3, 9), dtype=torch.float32)


def test_passes_that_a_cuda_graph_captures_show_nothing():
    model = network()
    optimizer = so.EigenAdam(model)
    with capturing():
        loss = model(torch.randn(9, 25, dtype=torch.float64)).square().mean()
    loss.backward()
    optimizer.step()  # at the first, a lazy layer has shown none
    with pytest.warns(UserWarning, match="sees no inputs of"):
        optimizer.step()
    assert optimizer.metrics()["seen"] == 0


def test_frozen_layers_have_no_state():
    model = network()
    model[2].requires_grad_(False)
    optimizer = so.EigenAdam(model)
    train(model, optimizer, range(6))
    assert not optimizer.state.get(model[2].weight)
    model[2].requires_grad_(True)
    optimizer.add_param_group({"params": model[2].parameters()})
    train(model, optimizer, range(6))


def test_a_bias_without_its_weight_is_trained():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's, that there is nothing to initialise
        model = nn.Sequential(nn.Linear(0, 5), nn.Linear(5, 3)).double()
    before = values(model)
    optimizer = so.EigenAdam(model)
    model[1].weight.requires_grad_(False)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.zeros(4, 0).double()), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    moved = (values(model) - before) != 0
    assert moved.tolist() == [True] * 5 + [False] * 15 + [True] * 3


@pytest.mark.parametrize("padding", [-999.0, -1e9])
def test_rows_that_the_loss_leaves_out_may_hold_anything(padding):
    """As padding of tables and sequences that a mask leaves out of the loss."""
    torch.manual_seed(0)
    x, counts = torch.randn(600, 6), torch.rand(600) < 0.5
    y = torch.tanh(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    rows = torch.where(counts[:, None], x, padding)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = so.EigenAdam(model)
    for _ in range(150):
        chosen = torch.randint(600, (64,))
        optimizer.zero_grad()
        F.mse_loss(model(rows[chosen])[counts[chosen]], y[chosen][counts[chosen]]).backward()
        optimizer.step()
    assert F.mse_loss(model(rows[counts]), y[counts]) < 0.3 * y[counts].var()


@pytest.mark.parametrize("padding", [0.0, -999.0])
def test_mean_inputs_are_no_longer_than_gradients_tell(padding):
    """The mean of a batch is taken up to 5 |G| / |g|, with the share of its renewal; where rows all count it is the mean."""
    layer = nn.Linear(7, 4).double()
    optimizer = so.EigenAdam(layer)
    expected = torch.zeros(7, dtype=torch.float64)
    for step in range(3):
        h = 1 + torch.randn(20, 7, dtype=torch.float64)
        h[12:] = torch.where(torch.tensor(padding != 0), padding, h[12:])
        optimizer.zero_grad()
        layer(h)[:12].sin().sum().backward()
        g_w, g_b, mean = layer.weight.grad, layer.bias.grad, h.mean(0)
        bound = 5 * g_w.norm() / g_b.norm()
        share = 0.1 / (1 - 0.9 ** (step + 1))
        expected = (1 - share) * expected + share * mean * min(1.0, (bound / mean.norm()).item())
        assert (mean.norm() > bound) == (padding != 0)
        optimizer.step()
        torch.testing.assert_close(optimizer.state[layer.weight]["mean"], expected)


def test_a_refused_renewal_bounds_no_mean():
    """Neither where the layer's own gradient is not finite, nor where another's is not."""
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)]).double()
    optimizer = so.EigenAdam(model, nonfinite="skip")
    rows = torch.cat([torch.randn(5, 3), torch.full((5, 3), -999.0)]).double()
    for factor in (1.0, torch.nan):
        before = [optimizer.state[layer.weight].get("mean", torch.zeros(3)).clone() for layer in model]
        optimizer.zero_grad()
        (model[0](rows)[:5].sin().sum() + factor * model[1](rows)[:5].sin().sum()).backward()
        optimizer.step()
    assert optimizer.skipped_steps == 1
    for layer, mean in zip(model, before, strict=True):
        assert mean.any()
        assert torch.equal(optimizer.state[layer.weight]["mean"], mean)


def test_inputs_are_not_kept():
    model = network(torch.float32)
    optimizer = so.EigenAdam(model)
    x = torch.randn(32, 25)
    hidden = []
    handle = model[1].register_forward_hook(lambda module, args, output: hidden.append(weakref.ref(output)))
    loss = model(x).sum()
    assert hidden[0]() is not None
    loss.backward()
    del loss
    gc.collect()
    assert hidden[0]() is None
    optimizer.step()
    handle.remove()


def test_state_beyond_two_moments_is_small():
    model = nn.Linear(1000, 800)
    optimizer = so.EigenAdam(model)
    model(torch.randn(8, 1000)).square().sum().backward()
    optimizer.step()
    numbers = sum(v.numel() for v in optimizer.state[model.weight].values() if isinstance(v, torch.Tensor))
    assert numbers < 2 * 800 * 1000 + 10 * 8 * 1800


def test_lazy_layers_that_the_loop_calls_first():
    """At the first step no input has been seen, and no compiled graph is suspected for that."""
    model = nn.Sequential(nn.LazyLinear(20), nn.Tanh(), nn.Linear(20, 3))
    optimizer = so.EigenAdam(model)
    losses = train(model, optimizer, range(2), dtype=torch.float32)
    assert optimizer.metrics()["seen"] == 1
    losses += train(model, optimizer, range(2, 40), dtype=torch.float32)
    assert losses[-1] < losses[0]


def test_lazy_layers():
    model = nn.Sequential(nn.LazyLinear(20), nn.Tanh(), nn.Linear(20, 3))
    optimizer = so.EigenAdam(model)
    model(torch.zeros(2, 25))
    losses = train(model, optimizer, range(40), dtype=torch.float32)
    assert losses[-1] < losses[0]
