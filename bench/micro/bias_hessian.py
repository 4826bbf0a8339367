"""The backward recursion of all bias Hessians of the paper's CIFAR net against plain PyTorch."""

import torch

from bench.timing import CIFAR_NET, interleaved, report
from secondorder import ops, reference


def main(batch: int = 1000) -> None:
    torch.manual_seed(0)
    pairs = list(zip(CIFAR_NET, CIFAR_NET[1:]))
    weights = [torch.randn(n_out, n_in) / n_in**0.5 for n_in, n_out in pairs]
    outputs = [torch.rand(batch, n) for n in CIFAR_NET[1:]]  # of the sigmoids
    grads = [torch.randn(batch, n) / batch for n in CIFAR_NET[1:]]
    top = torch.diag(torch.rand(CIFAR_NET[-1]))

    def plain() -> None:
        h = top
        for t in range(len(weights) - 1, 0, -1):
            s = outputs[t - 1]
            d1 = s * (1 - s)
            h = reference.bias_hessian(h, weights[t], d1, d1 * (1 - 2 * s), grads[t - 1], -1.0)

    def fused() -> None:
        h = top
        for t in range(len(weights) - 1, 0, -1):
            h = ops.bias_hessian_activation(h, weights[t], outputs[t - 1], "sigmoid", 1.0, grads[t - 1], -1.0)

    flops = sum(2 * k * k * n + (k + batch) * n * n for n, k in pairs[1:])  # with the symmetry of G used
    side = torch.randn(1024, 1024)
    rows = interleaved({"plain PyTorch": plain, "fused": fused, "1024^3 product": lambda: side @ side}, "plain PyTorch")
    rate = 2 * 1024**3 / rows["1024^3 product"]["ms"] / 1e6
    for name in ("plain PyTorch", "fused"):
        rows[name]["GFLOP/s"] = flops / rows[name]["ms"] / 1e6
    rows["1024^3 product"]["GFLOP/s"] = rate
    report(
        "bias_hessian",
        f"Recursion of the bias Hessians, {'-'.join(map(str, CIFAR_NET))}, batch {batch}, float32, "
        f"{torch.get_num_threads()} threads",
        rows,
        f"{flops / 1e9:.2f} GFLOP with symmetry: {flops / rate / 1e6:.1f} ms at the product's rate. Ratio: to plain PyTorch.",
    )


if __name__ == "__main__":
    main()
