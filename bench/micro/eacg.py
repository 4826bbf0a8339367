"""The EA-CG solve of all layers of the paper's CIFAR net: the paper's form and the closed form in plain PyTorch, and fused."""

import torch

from bench.timing import CIFAR_NET, interleaved, report
from secondorder import ops, reference

ALPHA, ITERATIONS, TOL = 0.01, 20, 0.0  # no early stop


def main() -> None:
    torch.manual_seed(0)
    pairs = list(zip(CIFAR_NET, CIFAR_NET[1:]))
    roots = [torch.randn(n, n) / n for _, n in pairs]
    hessians = [root @ root.T for root in roots]
    means = [torch.rand(n) for n, _ in pairs]
    grads = [torch.randn(n_out, n_in) for n_in, n_out in pairs]
    bias_grads = [torch.randn(n) for _, n in pairs]
    weights, biases = [torch.randn_like(g) for g in grads], [torch.randn_like(g) for g in bias_grads]
    momenta = [torch.zeros_like(g) for g in grads], [torch.zeros_like(g) for g in bias_grads]
    layers = len(pairs)

    def plain(truncated: bool) -> None:
        for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
            p, d, _ = reference.eacg_solve(hessians[i], means[i], grads[i], bias_grads[i], ALPHA, ITERATIONS, TOL, truncated)
            w.add_(p, alpha=1e-6)
            b.add_(d, alpha=1e-6)

    def fused(truncated: bool, momentum: float = 0.0) -> None:
        ops.eacg_update_(
            hessians, means, grads, bias_grads, weights, biases, *(momenta if momentum else ([], [])),
            [1e-6] * layers, [ALPHA] * layers, [momentum] * layers, [0.0] * layers, ITERATIONS, TOL, truncated,
        )  # fmt: skip

    rows = interleaved(
        {
            "plain PyTorch, as the paper writes it": lambda: plain(True),
            "plain PyTorch, closed form": lambda: plain(False),
            "fused, the paper's iterates": lambda: fused(True),
            "fused, closed form": lambda: fused(False),
            "fused, closed form, momentum": lambda: fused(False, 0.9),
            "solve alone, directions stored": lambda: ops.eacg_solve(
                hessians, means, grads, bias_grads, ALPHA, ITERATIONS, TOL, False
            ),
        },
        "plain PyTorch, closed form",
    )
    traffic = 4 * sum(4 * n_in * n_out for n_in, n_out in pairs)  # B twice, W read and written
    report(
        "eacg",
        f"EA-CG solve and update of all layers, {'-'.join(map(str, CIFAR_NET))}, {ITERATIONS} iterations, float32, "
        f"{torch.get_num_threads()} threads",
        rows,
        f"The closed form must move {traffic / 1e6:.0f} MB of gradients and weights. Ratio: to plain PyTorch, closed form.",
    )


if __name__ == "__main__":
    main()
