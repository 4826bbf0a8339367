"""KBFGS and KBFGSL against a plain float64 account of the paper's algorithm, with its variants and its start."""

import copy
import math

import pytest
import torch
from helpers.kbfgs import autoencoder, closure_of
from torch import nn

import secondorder as so


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
