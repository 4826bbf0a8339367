"""KBFGS and KBFGSL: against a plain float64 account of the paper's algorithm, on all sorts of models, on bad input."""

import copy
import math

import pytest
import torch
from torch import nn

import secondorder as so


def closure_of(optimizer, model, criterion, x, y):
    def closure():
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    return closure


def autoencoder(bias=True, activation=nn.ReLU, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(7, 9, bias=bias), activation(), nn.Linear(9, 4, bias=bias), nn.Linear(4, 6, bias=bias), activation(),
        nn.Linear(6, 7, bias=bias),
    ).to(dtype)  # fmt: skip


class Paper:
    """The paper's algorithm for an nn.Sequential, by autograd on per-layer matrices [W | b] and three-product BFGS."""

    def __init__(
        self, model, criterion, lr, damping, mu1, decay, weight_decay, bias_correction, memory=None, damping_a=None,
        damping_g=None, pairs="damped", input_inverse="hessian-action", doubled_batch=False,
    ):  # fmt: skip
        self.model, self.criterion, self.lr, self.mu1, self.decay = model, criterion, lr, mu1, decay
        self.shift, self.mu2 = (math.sqrt(damping) if own is None else own for own in (damping_a, damping_g))
        self.weight_decay, self.memory, self.pairs, self.exact = weight_decay, memory, pairs, input_inverse == "exact"
        self.doubled, self.second = doubled_batch, None
        self.left_out = 0
        self.layers = [m for m in model if isinstance(m, nn.Linear)]
        self.state, self.bias_correction, self.steps = None, bias_correction, 0

    def passes(self, x, y):
        h, inputs, outputs = x, [], []
        for module in self.model:
            if isinstance(module, nn.Linear):
                one = h.new_ones(len(h), module.bias is not None)
                inputs.append(torch.cat([h.detach(), one], 1))
                h = module(h)
                outputs.append(h)
            else:
                h = module(h)
        loss = self.criterion(h, y)
        grads = torch.autograd.grad(loss, outputs)
        return loss.item(), inputs, [z.detach() for z in outputs], grads

    @staticmethod
    def bfgs(h, s, y):
        v = torch.eye(len(s), dtype=s.dtype) - torch.outer(y, s) / (s @ y)
        return v.T @ h @ v + torch.outer(s, s) / (s @ y)

    def inverse_output(self, state):
        if self.memory is None:
            return state["hg"]
        h = torch.eye(len(state["s"]), dtype=torch.float64)
        for s, y in state["pairs"][-self.memory :]:
            h = self.bfgs(h, s, y)
        return h

    def step(self, x, y):
        loss, inputs, outputs, grads = self.passes(x, y)
        moments = [h.T @ h / len(h) for h in inputs]
        first = self.state is None
        self.steps += 1
        if first:
            self.state = [
                {
                    "m": torch.zeros(z.shape[1], len(a)).double(),
                    "a": a,
                    "ha": torch.linalg.inv(a + self.shift * torch.eye(len(a)).double()),
                    "hg": torch.eye(z.shape[1]).double(),
                    "s": torch.zeros(z.shape[1]).double(),
                    "y": torch.zeros(z.shape[1]).double(),
                    "pairs": [],
                }
                for a, z in zip(moments, outputs, strict=True)
            ]
        for layer, state, h, g, a in zip(self.layers, self.state, inputs, grads, moments, strict=True):
            own = [layer.weight] if layer.bias is None else [layer.weight, layer.bias.unsqueeze(1)]
            parameters = torch.cat([p.detach() for p in own], 1)
            gradient = g.T @ h + self.weight_decay * parameters
            if self.second is not None:
                gradient = (gradient + self.second[self.layers.index(layer)] + self.weight_decay * parameters) / 2
            state["m"] = self.decay * state["m"] + (1 - self.decay) * gradient
            if not first:
                state["a"] = self.decay * state["a"] + (1 - self.decay) * a
            correction = 1 - self.decay**self.steps if self.bias_correction else 1
            parameters = parameters - self.lr / correction * self.inverse_output(state) @ state["m"] @ state["ha"]
            layer.weight.data = parameters[:, : layer.in_features].clone()
            if layer.bias is not None:
                layer.bias.data = parameters[:, -1].clone()
        _, new_inputs, new_outputs, new_grads = self.passes(x, y)
        if self.doubled:
            self.second = [g.T @ h for g, h in zip(new_grads, new_inputs, strict=True)]
        for state, h, z, g, z_new, g_new in zip(self.state, inputs, outputs, grads, new_outputs, new_grads, strict=True):
            state["s"] = self.decay * state["s"] + (1 - self.decay) * (z_new.mean(0) - z.mean(0))
            state["y"] = self.decay * state["y"] + (1 - self.decay) * (g_new.sum(0) - g.sum(0))
            s, y_, hg = state["s"], state["y"], self.inverse_output(state)
            yhy = y_ @ hg @ y_
            if self.pairs != "bounded" and s @ y_ < self.mu1 * yhy:
                theta = (1 - self.mu1) * yhy / (yhy - s @ y_)
                s = theta * s + (1 - theta) * hg @ y_
            if self.pairs != "bounded" and s @ y_ < self.mu2 * (s @ s):
                theta = (1 - self.mu2) * (s @ s) / (s @ s - s @ y_)
                y_ = theta * y_ + (1 - theta) * s
            bound = 1.001 * (s @ y_)
            if self.pairs == "damped" or (self.mu1 * (y_ @ hg @ y_) <= bound and self.mu2 * (s @ s) <= bound):
                state["hg"] = self.bfgs(hg, s, y_)
                state["pairs"].append((s, y_))
            else:
                self.left_out += 1
            s = state["ha"] @ h.mean(0)
            if self.exact:
                state["ha"] = torch.linalg.inv(state["a"] + self.shift * torch.eye(len(s)).double())
            else:
                state["ha"] = self.bfgs(state["ha"], s, state["a"] @ s + self.shift * s)
        return loss


# The algorithm


@pytest.mark.parametrize("memory", [None, 3, 50])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("activation", "bias_correction"), [(nn.ReLU, False), (nn.Tanh, True)])
def test_steps_are_the_papers(bias, activation, memory, bias_correction):
    model = autoencoder(bias, activation)
    twin = copy.deepcopy(model)
    options = {"damping": 0.3, "mu1": 0.2, "decay": 0.9, "weight_decay": 1e-3, "bias_correction": bias_correction}
    paper = Paper(twin, nn.MSELoss(), 0.3, memory=memory, **options)
    if memory is None:
        optimizer = so.KBFGS(model, nn.MSELoss(), 0.3, max_increase=math.inf, scale=None, max_step=None, **options)
    else:
        optimizer = so.KBFGSL(
            model, nn.MSELoss(), 0.3, memory=memory, max_increase=math.inf, scale=None, max_step=None, **options
        )
    for step in range(12):
        torch.manual_seed(step)
        x = torch.randn(16, 7, dtype=torch.float64)
        loss = optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x))
        assert loss.item() == pytest.approx(paper.step(x, x), rel=1e-9)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
    assert all(counts["updated"] == 12 for counts in optimizer.diagnostics().values())


@pytest.mark.parametrize("memory", [None, 4])
@pytest.mark.parametrize(
    "variant",
    [
        {"damping_a": 0.05, "damping_g": 0.9},
        {"pairs": "damped-bounded", "mu1": 0.5, "damping_g": 0.3, "decay": 0.3},
        {"pairs": "bounded", "input_inverse": "exact"},
        {"doubled_batch": True},
        {"doubled_batch": True, "pairs": "bounded", "input_inverse": "exact", "damping_a": 2.0, "damping_g": 0.9},
    ],
    ids=lambda variant: ",".join(variant),
)
def test_steps_of_the_papers_variants(variant, memory):
    """Dampings of their own, Section 3's rule for leaving updates out, Section 5's method, Section 6's doubled batch."""
    model = autoencoder(activation=nn.Tanh)
    twin = copy.deepcopy(model)
    options = {"damping": 0.3, "mu1": 0.2, "decay": 0.9, "weight_decay": 1e-3, "bias_correction": True, **variant}
    paper = Paper(twin, nn.MSELoss(), 0.3, memory=memory, **options)
    cls, room = (so.KBFGS, {}) if memory is None else (so.KBFGSL, {"memory": memory})
    optimizer = cls(model, nn.MSELoss(), 0.3, max_increase=math.inf, scale=None, max_step=None, **room, **options)
    for step in range(12):
        torch.manual_seed(step)
        x = torch.randn(16, 7, dtype=torch.float64)
        loss = optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x))
        assert loss.item() == pytest.approx(paper.step(x, x), rel=1e-9)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
    counts = optimizer.diagnostics().values()
    assert sum(each["skipped"] for each in counts) == paper.left_out
    assert (paper.left_out > 0) == ("bounded" in variant.get("pairs", ""))
    assert sum(each["input_skipped"] for each in counts) == 0


def test_exact_input_inverses_are_bounded_where_activations_are():
    """Lemma 1: for |h_i| <= 1 and n entries, the bias' among them, the eigenvalues of H_a lie in [1 / (n + l), 1 / l]."""
    model = autoencoder(activation=nn.Tanh)
    optimizer = so.KBFGS(model, nn.MSELoss(), damping_a=0.3, input_inverse="exact")
    for step in range(20):
        torch.manual_seed(step)
        x = torch.rand(5, 7, dtype=torch.float64) * 2 - 1
        optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x))
    for layer in (model[0], model[2], model[5]):
        values = torch.linalg.eigvalsh(optimizer.state[layer.weight]["inverse_input"])
        n = layer.in_features + 1
        assert values[0] >= 1 / (n + 0.3) * (1 - 1e-9)
        assert values[-1] <= 1 / 0.3 * (1 + 1e-9)
    assert values[-1] > 1  # and not some other matrix


def test_the_doubled_batch_resumes_and_forgets_steps_that_were_not_taken():
    torch.manual_seed(0)
    model, x = autoencoder(), torch.randn(16, 7, dtype=torch.float64)
    optimizer = so.KBFGS(model, nn.MSELoss(), doubled_batch=True)
    optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x))
    twin = copy.deepcopy(model)
    other = so.KBFGS(twin, nn.MSELoss(), doubled_batch=True)
    other.load_state_dict(optimizer.state_dict())
    for each, net in ((optimizer, model), (other, twin)):
        each.step(closure_of(each, net, nn.MSELoss(), x + 1, x))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert "second_gradient" in optimizer.state[model[0].weight]
    for group in optimizer.param_groups:
        group["lr"] = 1e9
    optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x))
    assert all(counts["rejected"] == 1 for counts in optimizer.diagnostics().values())
    assert "second_gradient" not in optimizer.state[model[0].weight]


def gradient_at(model, x):
    """Of the first layer's [W | b], for the mean square of model(x) - x."""
    own = [model[0].weight, model[0].bias]
    w, b = torch.autograd.grad(nn.MSELoss()(model(x), x), own)
    return torch.cat([w, b.unsqueeze(1)], 1)


@pytest.mark.parametrize("maximize", [False, True])
def test_the_doubled_batch_takes_the_gradient_after_the_accepted_trial_alone(maximize):
    """Of halved steps, with a closure that clears no gradients."""
    model, x = autoencoder(), torch.randn(16, 7, dtype=torch.float64)
    optimizer = so.KBFGS(model, nn.MSELoss(), lr=30.0, doubled_batch=True, maximize=maximize)

    def closure():
        loss = nn.MSELoss()(model(x), x)
        loss = -loss if maximize else loss
        loss.backward()
        return loss

    optimizer.step(closure)
    state = optimizer.state[model[0].weight]
    assert state["halvings"] > 0
    assert state["rejected"] == 0
    torch.testing.assert_close(state["second_gradient"], gradient_at(model, x), rtol=1e-9, atol=1e-12)


def test_the_doubled_batch_forgets_the_gradients_of_layers_that_are_left_out():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.branch, self.both = nn.Linear(7, 7), nn.Linear(7, 7), True

        def forward(self, x):
            return self.trunk(x) + (self.branch(x) if self.both else 0)

    model, x = Branches().double(), torch.randn(16, 7, dtype=torch.float64)
    optimizer = so.KBFGS(model, nn.MSELoss(), doubled_batch=True)
    optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x))
    assert "second_gradient" in optimizer.state[model.branch.weight]
    model.both = False
    optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x))
    assert "second_gradient" not in optimizer.state[model.branch.weight]
    assert "second_gradient" in optimizer.state[model.trunk.weight]


def test_a_failure_after_the_trial_changes_nothing(monkeypatch):
    model, x = autoencoder(), torch.randn(16, 7, dtype=torch.float64)
    optimizer = so.KBFGS(model, nn.MSELoss(), doubled_batch=True)

    def fail(*_):
        raise RuntimeError("another rank has failed")

    monkeypatch.setattr(optimizer, "_second_gradients", fail)
    closure = closure_of(optimizer, model, nn.MSELoss(), x, x)
    unchanged(model, optimizer, lambda: optimizer.step(closure), RuntimeError, "another rank has failed")


def test_limited_memory_with_room_for_every_pair_is_kbfgs():
    models = [autoencoder() for _ in range(2)]
    optimizers = [so.KBFGS(models[0], nn.MSELoss()), so.KBFGSL(models[1], nn.MSELoss(), memory=30)]
    for step in range(20):
        torch.manual_seed(step)
        x = torch.randn(16, 7, dtype=torch.float64)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x))
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_initialize_takes_the_moments_of_all_batches():
    model = autoencoder()
    optimizer = so.KBFGS(model, nn.MSELoss(), damping=0.25)
    x = torch.randn(50, 7, dtype=torch.float64)
    optimizer.initialize(x.split(15))
    h = torch.cat([torch.relu(model[0](x)), torch.ones(50, 1)], 1).detach()
    state = optimizer.state[model[2].weight]
    torch.testing.assert_close(state["input_second_moment"], h.T @ h / 50)
    damped = h.T @ h / 50 + 0.5 * torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(state["inverse_input"] @ damped, torch.eye(10, dtype=torch.float64), atol=1e-10, rtol=0)
    batch = x[:15]
    optimizer.step(closure_of(optimizer, model, nn.MSELoss(), batch, batch))
    torch.testing.assert_close(state["input_second_moment"], h.T @ h / 50)  # the first step's A is the start's


@pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL])
@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 5.0]])
def test_initialize_with_a_loss_counts_rows_as_their_targets(weight, cls):
    """A = E[h h^T] of [h | 1], against sums over the rows themselves."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    criterion = nn.CrossEntropyLoss(weight and torch.tensor(weight).double())
    optimizer = cls(model, criterion)
    x, y = torch.randn(50, 5).double(), torch.arange(50) % 3
    y[7:30] = -100
    optimizer.initialize(zip(x.split(15), y.split(15), strict=True), lambda batch: criterion(model(batch[0]), batch[1]))
    w = (y != -100) * (torch.ones(3) if weight is None else torch.tensor(weight))[y.clamp(min=0)].double()
    h = torch.cat([x, torch.ones(50, 1)], 1)
    for layer in (model[0], model[2]):
        torch.testing.assert_close(optimizer.state[layer.weight]["input_second_moment"], (h.T * w) @ h / w.sum())
        h = torch.cat([torch.tanh(model[0](x)), torch.ones(50, 1)], 1).detach()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(TypeError, match="expected loss to be a function of a batch, got Tensor"):
        optimizer.initialize(x.split(15), y)
    for wrong, got in (
        (lambda h: (model(h).sum(), 1), "tuple"),
        (model, r"shape \[15, 3\]"),
        (lambda h: h.sum(), "requires_grad=False"),
    ):
        with pytest.raises(RuntimeError, match=f"expected loss to return the scalar loss with its graph, got .*{got}"):
            optimizer.initialize(x.split(15), wrong)


def test_gradients_after_a_step_are_those_of_the_first_call():
    model = autoencoder()
    optimizer = so.KBFGS(model, nn.MSELoss())
    x = torch.randn(16, 7, dtype=torch.float64)
    closure = closure_of(optimizer, model, nn.MSELoss(), x, x)
    closure()
    expected = [p.grad.clone() for p in model.parameters()]
    optimizer.step(closure)
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, gradient)
        assert p.requires_grad


def test_second_call_computes_no_parameter_gradients():
    model = autoencoder()
    optimizer = so.KBFGS(model, nn.MSELoss())
    x = torch.randn(16, 7, dtype=torch.float64)
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x)
        loss.backward()
        seen.append([p.grad.clone() for p in model.parameters()])
        return loss

    optimizer.step(closure)
    assert len(seen) > 1
    for later in seen[1:]:  # what there is are copies of the first call's, for a closure that clips them
        assert all(torch.equal(a, b) for a, b in zip(seen[0], later, strict=True))


# The safeguard


def test_a_step_that_raises_the_loss_is_halved():
    model = autoencoder()
    optimizer = so.KBFGS(model, nn.MSELoss(), lr=1e3)
    x = torch.randn(64, 7, dtype=torch.float64)
    closure = closure_of(optimizer, model, nn.MSELoss(), x, x)
    for _ in range(5):
        before = optimizer.step(closure)
        assert closure().item() <= 1.05 * before.item()
    assert all(counts["halvings"] > 0 for counts in optimizer.diagnostics().values())


def test_a_hopeless_step_is_given_up():
    model = autoencoder()
    optimizer = so.KBFGS(model, nn.MSELoss(), lr=1e12)
    x = torch.randn(64, 7, dtype=torch.float64)
    before = [p.clone() for p in model.parameters()]
    optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(c["rejected"] == 1 and c["updated"] == c["skipped"] == 0 for c in optimizer.diagnostics().values())
    optimizer.param_groups[0]["lr"] = 0.3
    optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x))
    assert not torch.equal(model[0].weight, before[0])


# Models


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(5, 8, bias=False), nn.Linear(8, 3)
        self.norm, self.scale = nn.LayerNorm(8), nn.Parameter(torch.ones(()))

    def forward(self, x):
        h = nn.functional.relu(self.a(x), inplace=True) * torch.sigmoid(self.b(input=x))
        return self.scale * self.c(self.norm(h))


@pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL])
def test_custom_module_with_fallback_trains(cls):
    torch.manual_seed(0)
    model = Custom()
    optimizer = cls(model, nn.CrossEntropyLoss(), lr=0.1)
    x = torch.randn(200, 5)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    closure = closure_of(optimizer, model, nn.CrossEntropyLoss(), x, y)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.warns(UserWarning, match=r"'scale', 'norm.weight', 'norm.bias'; they are updated by the fallback"):
        losses = [optimizer.step(closure).item()]
    losses += [optimizer.step(closure).item() for _ in range(30)]
    assert losses[-1] < 0.6 * losses[0]
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert set(optimizer.diagnostics()) == {"a", "b", "c"}


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.GELU, lambda: nn.ReLU(inplace=True), nn.Identity])
def test_sequences_and_extra_dimensions(activation):
    """Inputs [batch, time, n] count as batch * time instances."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), activation(), nn.Linear(6, 2))
    twin = copy.deepcopy(model)
    x, y = torch.randn(10, 3, 4), torch.randn(10, 3, 2)
    for m, inputs, targets in ((model, x, y), (twin, x.reshape(30, 4), y.reshape(30, 2))):
        optimizer = so.KBFGS(m, nn.MSELoss())
        for _ in range(3):
            optimizer.step(closure_of(optimizer, m, nn.MSELoss(), inputs, targets))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_micro_batches_are_their_union():
    """A closure of two forward-backward passes, each of half the loss, is one over both halves."""
    torch.manual_seed(0)
    models = [autoencoder() for _ in range(2)]
    x = torch.randn(20, 7, dtype=torch.float64)
    optimizers = [so.KBFGS(m, nn.MSELoss()) for m in models]

    def halves():
        optimizers[1].zero_grad()
        total = 0
        for part in x.split(10):
            loss = nn.functional.mse_loss(models[1](part), part) / 2
            loss.backward()
            total += loss.detach()
        return total

    for _ in range(5):
        optimizers[0].step(closure_of(optimizers[0], models[0], nn.MSELoss(), x, x))
        optimizers[1].step(halves)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


def test_dropout_repeats_its_mask():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2))
    x, y = torch.randn(30, 6), torch.randn(30, 2)
    masks = []
    model[0].register_forward_hook(lambda module, args, output: masks.append(output == 0))
    optimizer = so.KBFGS(model, nn.MSELoss())
    for _ in range(2):
        optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, y))
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[-2], masks[-1])
    assert not torch.equal(masks[0], masks[-1])


def test_evaluation_inside_the_closure_does_not_count():
    models = [autoencoder() for _ in range(2)]
    x = torch.randn(20, 7, dtype=torch.float64)
    optimizers = [so.KBFGS(m, nn.MSELoss()) for m in models]

    def closure():
        models[1](2 * x)
        with torch.no_grad():
            models[1](3 * x)
        return closure_of(optimizers[1], models[1], nn.MSELoss(), x, x)()

    for _ in range(3):
        optimizers[0].step(closure_of(optimizers[0], models[0], nn.MSELoss(), x, x))
        optimizers[1].step(closure)
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_autocast():
    """Under autocast the layers compute in bfloat16; the factors keep the parameters' dtype."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9, bias=False), nn.ReLU(), nn.Linear(9, 6))
    optimizer = so.KBFGS(model, nn.MSELoss(), lr=0.1)
    x = torch.randn(50, 6)

    def closure():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        loss = nn.functional.mse_loss(output.float(), x)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.state[model[2].weight]["input_second_moment"].dtype == torch.float32


# torch.optim's contract


@pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL])
def test_state_dict_round_trip_is_exact(cls, tmp_path):
    torch.manual_seed(0)
    model = autoencoder(dtype=torch.float32)
    optimizer = cls(model, nn.MSELoss())
    x = torch.randn(20, 7)

    def train(optimizer, model, steps):
        return [optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x)).item() for _ in range(steps)]

    train(optimizer, model, 4)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    other = autoencoder(dtype=torch.float32)
    resumed = cls(other, nn.MSELoss(), lr=1.0)
    checkpoint = torch.load(tmp_path / "checkpoint")
    other.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["optimizer"])
    assert resumed.diagnostics() == optimizer.diagnostics()
    assert train(resumed, other, 4) == train(optimizer, model, 4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_parameter_groups_and_schedulers_are_read_at_every_step():
    model = autoencoder()
    optimizer = so.KBFGS(model, nn.MSELoss(), lr=0.1)
    optimizer.param_groups[0]["params"] = list(model[0].parameters())
    optimizer.add_param_group({"params": [p for m in model[1:] for p in m.parameters()], "lr": 0.0})
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.0)
    before = [p.clone() for p in model.parameters()]
    x = torch.randn(20, 7, dtype=torch.float64)
    optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x))
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [True, True] + [False] * 6
    scheduler.step()
    before = model[0].weight.clone()
    optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x))
    assert torch.equal(model[0].weight, before)


# Bad input


def unchanged(model, optimizer, action, error, match):
    parameters, state = [p.clone() for p in model.parameters()], copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=match):
        action()
    assert all(torch.equal(p, q) and p.requires_grad for p, q in zip(model.parameters(), parameters, strict=True))
    for key, value in optimizer.state_dict()["state"].items():
        for name, v in value.items():
            other = state["state"][key][name]
            assert torch.equal(v, other) if isinstance(v, torch.Tensor) else v == other


@pytest.mark.parametrize("steps", [0, 2])
def test_bad_closures_change_nothing(steps):
    torch.manual_seed(0)
    model = autoencoder()
    optimizer = so.KBFGS(model, nn.MSELoss())
    x = torch.randn(20, 7, dtype=torch.float64)
    for _ in range(steps):
        optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x))

    def other_data():
        return closure_of(optimizer, model, nn.MSELoss(), torch.randn(20, 7).double(), x)()

    def other_size():
        n = next(sizes)
        return closure_of(optimizer, model, nn.MSELoss(), x[:n], x[:n])()

    sizes = iter([20, 10])

    calls = []

    def fails_at_second_call():
        calls.append(1)
        if len(calls) == 1:
            return closure_of(optimizer, model, nn.MSELoss(), x, x)()
        raise KeyError("second call")

    bad = x.clone()
    bad[3, 3] = math.nan
    batches = iter([torch.randn(20, 7).double(), torch.randn(20, 7).double()])

    def next_batch():
        batch = next(batches)
        return closure_of(optimizer, model, nn.MSELoss(), batch, batch)()

    unchanged(model, optimizer, lambda: optimizer.step(), RuntimeError, "expected a closure")
    unchanged(model, optimizer, lambda: optimizer.step(next_batch), RuntimeError, "same mini-batch at every call")
    unchanged(model, optimizer, lambda: optimizer.step(other_size), RuntimeError, "same mini-batch at every call")
    unchanged(model, optimizer, lambda: optimizer.step(fails_at_second_call), KeyError, "second call")
    unchanged(
        model, optimizer, lambda: optimizer.step(closure_of(optimizer, model, nn.MSELoss(), bad, x)), RuntimeError,
        "gradient of layer '0', '2', '3', '5' holds NaN or inf",
    )  # fmt: skip
    unchanged(
        model,
        optimizer,
        lambda: optimizer.step(lambda: model(x).sum().backward()),
        RuntimeError,
        "return the scalar loss",
    )
    optimizer.zero_grad()
    unchanged(model, optimizer, lambda: optimizer.step(lambda: model(x).sum()), RuntimeError, "expected gradients, found none")
    # A closure that draws from torch's generator draws the same batch twice: that is no error.
    optimizer.step(other_data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr >= 0"), ({"damping": 0}, r"damping in \(0, 1\]"), ({"damping": 1.5}, "damping"),
        ({"mu1": 1.0}, "mu1"), ({"decay": 1.0}, "decay"), ({"weight_decay": -1}, "weight_decay"),
        ({"max_increase": -0.1}, "max_increase"), ({"fallback": "no"}, "fallback"), ({"memory": 0}, "memory >= 1"),
        ({"damping_a": 0.0}, r"damping_a > 0, or None"), ({"damping_g": 1.5}, r"damping_g in \(0, 1\]"),
        ({"pairs": "all"}, "pairs to be one of 'damped', 'damped-bounded', 'bounded', got 'all'"),
        ({"input_inverse": "inverse"}, "'hessian-action' or 'exact'"),
    ],
)  # fmt: skip
def test_constructor_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        so.KBFGSL(autoencoder(), nn.MSELoss(), **options)


def test_zero_input_layer_is_skipped_and_counted():
    """Without a bias, a mean input of zero gives Hessian action nothing to act on."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2))
    optimizer = so.KBFGS(model, nn.MSELoss())
    x = torch.zeros(10, 3)
    optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, torch.ones(10, 2)))
    counts = optimizer.diagnostics()
    assert counts["0"]["input_skipped"] == 1
    assert counts["0"]["damped_s"] == 1  # s = 0 there: no step can move the preactivations
    assert counts["2"]["input_skipped"] == counts["2"]["skipped"] == 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_closure_that_adds_to_gradients_from_before_it_is_refused(set_to_none):
    model, criterion = autoencoder(), nn.MSELoss()
    x = torch.randn(8, 7).double()
    optimizer = so.KBFGS(model, criterion)

    def accumulates():
        loss = criterion(model(x), x)
        loss.backward()
        return loss

    def zeroes():
        optimizer.zero_grad(set_to_none)
        return accumulates()

    accumulates()
    before, gradient = copy.deepcopy((model.state_dict(), optimizer.state_dict())), model[0].weight.grad.clone()
    with pytest.raises(RuntimeError, match=r"expected a closure that calls optimizer.zero_grad\(\) first"):
        optimizer.step(accumulates)
    assert all(torch.equal(value, before[0][key]) for key, value in model.state_dict().items())
    assert optimizer.state_dict()["state"] == before[1]["state"] == {}
    optimizer.step(zeroes)
    torch.testing.assert_close(model[0].weight.grad, gradient)
    model.zero_grad()
    optimizer.step(accumulates)


# Scales


def losses_of(cls, factor, steps=25, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    x, y = torch.randn(80, 6, dtype=dtype), torch.arange(80) % 3
    criterion = nn.CrossEntropyLoss()
    optimizer = cls(model, criterion, **options)

    def closure():
        optimizer.zero_grad()
        loss = factor * criterion(model(x), y)
        loss.backward()
        return loss

    return [optimizer.step(closure).item() / factor for _ in range(steps)]


@pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL])
@pytest.mark.parametrize("factor", [1e-6, 1e6, 1e-20, 1e20])
def test_training_does_not_depend_on_the_scale_of_the_loss(factor, cls):
    assert losses_of(cls, factor) == pytest.approx(losses_of(cls, 1.0), rel=1e-5)
    single = losses_of(cls, factor, dtype=torch.float32)
    assert single[-1] == pytest.approx(losses_of(cls, 1.0)[-1], rel=0.05)


def test_a_mean_loss_of_few_outputs_is_trained_faster_than_in_the_papers_units():
    assert losses_of(so.KBFGS, 1.0, 40)[-1] < 0.9 * losses_of(so.KBFGS, 1.0, 40, scale=None, max_step=None)[-1]


def test_the_scale_is_the_mean_curvature_of_the_pairs():
    """A quadratic loss z.D z / 2 of one layer's outputs has y = D s, on which c is bounded by D's eigenvalues."""
    torch.manual_seed(0)
    model, d = nn.Sequential(nn.Linear(4, 3)).double(), torch.tensor([2.0, 2.0, 2.0]).double()
    optimizer = so.KBFGS(model, lambda z, _: (z * d * z).mean(0).sum() / 2)
    x = torch.randn(30, 4).double()
    for _ in range(6):
        optimizer.step(closure_of(optimizer, model, optimizer.criterion, x, x))
    assert optimizer.state[model[0].weight]["scale"] == pytest.approx(2.0)


@pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL])
def test_steps_are_no_longer_than_max_step(cls):
    model = autoencoder()
    optimizer = cls(model, nn.MSELoss(), lr=1.0, max_step=0.01)
    x = torch.randn(40, 7, dtype=torch.float64)
    for _ in range(8):
        before = [p.clone() for p in model.parameters()]
        optimizer.step(closure_of(optimizer, model, nn.MSELoss(), x, x))
        moved = [(p - q).square().sum(-1) for p, q in zip(model.parameters(), before, strict=True)]
        for rows, biases in zip(moved[::2], [model[i].bias.numel() for i in (0, 2, 3, 5)], strict=True):
            assert rows.sum().sqrt() <= 0.01 * biases**0.5 * (1 + 1e-9)


@pytest.mark.parametrize("options", [{"scale": "loss"}, {"max_step": 0.0}], ids=str)
def test_scales_and_bounds_that_are_none(options):
    with pytest.raises(ValueError, match=f"expected {next(iter(options))}"):
        so.KBFGS(autoencoder(), nn.MSELoss(), **options)


@pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL])
@pytest.mark.parametrize("function", [False, True])
def test_rows_of_ignored_targets_do_not_count(function, cls):
    """As without them, for layers whose rows are the targets'."""
    models = []
    for whole in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        criterion = torch.nn.functional.cross_entropy if function else nn.CrossEntropyLoss()
        optimizer = cls(model, criterion)
        x, y = torch.randn(40, 5).double(), torch.arange(40) % 3
        y[7:30] = -100
        x[7:30] += 3
        kept = slice(None) if whole else y != -100
        closure = closure_of(optimizer, model, optimizer.criterion, x[kept], y[kept])
        for _ in range(6):
            optimizer.step(closure)
        models.append(model)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL])
def test_weights_in_micro_batches_of_a_closure_are_those_of_their_union(cls, reduction):
    models = []
    for parts in (1, 3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 5.0]).double(), reduction=reduction)
        optimizer = cls(model, criterion)
        x, y = torch.randn(45, 5).double(), torch.arange(45) % 3
        y[[4, 5, 19, 20, 34, 35]] = -100  # every part has the same weights together, so that its mean is that of the union
        x[y == -100] += 3

        def closure(optimizer=optimizer, model=model, criterion=criterion, x=x, y=y, parts=parts):
            optimizer.zero_grad()
            with torch.no_grad():
                criterion(model(x[:7]), y[:7])  # for a log
            total = 0.0
            for own_x, own_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
                loss = criterion(model(own_x), own_y) / (parts if reduction == "mean" else 1)
                loss.backward()
                total += loss.detach()
            return total

        for _ in range(5):
            optimizer.step(closure)
        models.append(model)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("cls", [so.KBFGS, so.KBFGSL])
def test_a_state_in_other_units_is_refused(cls):
    model, criterion = nn.Linear(3, 2), nn.MSELoss()
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    states = {}
    for scale in ("curvature", None):
        optimizer = cls(model, criterion, scale=scale)

        def closure(optimizer=optimizer):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        states[scale] = optimizer.state_dict()
    for scale, other in (("curvature", None), (None, "curvature")):
        with pytest.raises(ValueError, match=f"make this one with scale={other!r}"):
            cls(model, criterion, scale=scale).load_state_dict(states[other])
