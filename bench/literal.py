"""EA-CG exactly as its paper writes it, in plain PyTorch: what `secondorder.EACG` is measured against.

For an nn.Sequential of linear layers with sigmoids between them, and cross-entropy. Bias Hessians by dense products (Eq. 8),
directions by CG on [n_out, n_in] matrices with the product of Eq. 11b; no reduced space, no fusion.
"""

import torch
from torch import Tensor, nn

from secondorder import reference


class LiteralEACG:
    """W <- W + lr P. `step(x, y)` does the forward and backward pass itself and returns the loss."""

    def __init__(
        self, model: nn.Sequential, lr: float, alpha: float, max_cg: int, eps_cg: float, gamma: float = -1.0,
        compiled: bool = False,
    ):  # fmt: skip
        self.layers = [layer for layer in model if isinstance(layer, nn.Linear)]
        self.lr, self.alpha, self.max_cg, self.eps_cg, self.gamma = lr, alpha, max_cg, eps_cg, gamma
        self.recursion = torch.compile(reference.bias_hessian, dynamic=True) if compiled else reference.bias_hessian

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step on one batch."""
        inputs, h = [], x
        for layer in self.layers:
            if h is not x:
                h.retain_grad()
            inputs.append(h)
            z = layer(h)
            h = torch.sigmoid(z)
        loss = nn.functional.cross_entropy(z, y)
        for layer in self.layers:
            layer.weight.grad = layer.bias.grad = None
        loss.backward()
        with torch.no_grad():
            for layer, hessian, h in zip(self.layers, self.bias_hessians(inputs, z), inputs, strict=True):
                gradients, truncated = (layer.weight.grad, layer.bias.grad), True
                p, d, _ = reference.eacg_solve(hessian, h.mean(0), *gradients, self.alpha, self.max_cg, self.eps_cg, truncated)
                layer.weight += self.lr * p
                layer.bias += self.lr * d
        return loss

    def bias_hessians(self, inputs: list[Tensor], output: Tensor) -> list[Tensor]:
        """The PCH's blocks from the first layer to the last."""
        p = output.softmax(1)
        blocks = [(torch.diag(p.sum(0)) - p.T @ p) / len(p)]
        for layer, h in zip(reversed(self.layers[1:]), reversed(inputs[1:]), strict=True):
            d1 = h * (1 - h)
            blocks.append(self.recursion(blocks[-1], layer.weight, d1, d1 * (1 - 2 * h), h.grad, self.gamma))
        return blocks[::-1]
