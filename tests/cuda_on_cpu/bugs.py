"""Bugs that one of the checks must see, as changes of the kernels' source: `PLANTED` is whether the bug is switched on."""

from harness import Bug


def bug(mode: str, case: str, file: str, old: str, new: str, *more: tuple[str, str, str]) -> Bug:
    return Bug(mode, case, ((file, old, new), *more))


def without_barrier(case: str, file: str, before: str, after: str = "") -> Bug:
    """A missing __syncthreads() between two pieces of source."""
    return bug("races", case, file, f"{before}__syncthreads();{after}", f"{before}if (!PLANTED) __syncthreads();{after}")


BUGS = {
    "missing barrier after a chunk is stored": without_barrier(
        "bias_hessian_large_tile", "bias_hessian.cu", "    store_chunk(k, stage);\n    "
    ),
    "missing barrier between two uses of a sum's memory": without_barrier(
        "bfgs_update", "reduce.cuh", "partial[c][lane] : 0.0);\n  "
    ),
    "missing fence in the barrier of a group": bug(
        "races",
        "eacg_every_plan",
        "eacg.cu",
        "    __threadfence();\n    atomicAdd",
        "    if (!PLANTED) __threadfence();\n    atomicAdd",
    ),
    "one buffer where two alternate": bug(
        "values", "eacg_every_plan", "eacg.cu", "(iteration & 1) * kSystems * n", "(PLANTED ? 0 : iteration & 1) * kSystems * n"
    ),
    "off-by-one guard of a row": bug(
        "address", "bfgs_update", "bfgs.cu", "if (row >= n) return;", "if (row >= n + PLANTED) return;"
    ),
    "off-by-one guard of a tile": bug(
        "address",
        "bias_hessian_large_tile",
        "bias_hessian.cu",
        "row >= n || col > row) return",
        "row >= n + PLANTED || col > row) return",
    ),
    "vector loads without a look at the alignment": bug(
        "races",
        "activation_derivatives",
        "activation.cu",
        "if (aligned(n, saved, d1, d2))",
        "if (PLANTED ? n % kSize == 0 : aligned(n, saved, d1, d2))",
    ),
    "alignment of the momentum not looked at": bug(
        "races",
        "eacg_update",
        "eacg.cu",
        "in.weight, in.weight_momentum)",
        "in.weight, PLANTED ? in.weight : in.weight_momentum)",
    ),
    "alignment of y not looked at": bug(
        "races",
        "bfgs_update",
        "bfgs.cu",
        "aligned(n, in.inverse_hessian, in.s, in.y)",
        "aligned(n, in.inverse_hessian, in.s, PLANTED ? in.s : in.y)",
    ),
    "wrong mask of a shuffle": bug(
        "values",
        "bfgs_update",
        "reduce.cuh",
        "v += __shfl_xor_sync(0xffffffffu",
        "v += __shfl_xor_sync(PLANTED ? 0x0000ffffu : 0xffffffffu",
    ),
    "maximum over half of the lanes": bug(
        "values",
        "eacg_overflow",
        "reduce.cuh",
        "T warp_max(T v) {\n#pragma unroll\n  for (int offset = kWarp / 2;",
        "T warp_max(T v) {\n#pragma unroll\n  for (int offset = kWarp / (PLANTED ? 4 : 2);",
    ),
    "missing mirror image": bug(
        "values",
        "bias_hessian_large_tile",
        "bias_hessian.cu",
        "    out[col * n + row] = g[i];\n",
        "    if (!PLANTED) out[col * n + row] = g[i];\n",
    ),
    "missing barrier between two rows of a substitution": without_barrier(
        "lbfgs_product", "bfgs.cu", "diagonal(i);\n    }\n    "
    ),
    "an element that a substitution leaves out": bug(
        "values", "lbfgs_product", "bfgs.cu", "if (j > i && j < p) z[s]", "if (j > i + PLANTED && j < p) z[s]"
    ),
    "the last element of a row in registers beyond it": bug(
        "address", "lbfgs_product", "bfgs.cu", "if (j < p) z[s] +=", "if (j < p + PLANTED) z[s] +="
    ),
    "last part of a batch as long as the others": bug(
        "address",
        "bias_hessian_parts",
        "bias_hessian.cu",
        "return (part + 1) * rows < m ?",
        "return PLANTED || (part + 1) * rows < m ?",
    ),
    "one part of the sums read for all": bug(
        "values",
        "bias_hessian_parts",
        "bias_hessian.cu",
        "sum += work.sums[part * work.side",
        "sum += work.sums[(PLANTED ? 0 : part) * work.side",
    ),
    "missing barrier before the sums of the rows' threads": without_barrier(
        "bias_hessian_parts", "bias_hessian.cu", "= sum[e];\n  "
    ),
    "float32 sums of a diagonal": bug(
        "values",
        "bias_hessian_large_batch",
        "bias_hessian.cu",
        "sum[e] += double(second) * double(grad[e]);",
        "sum[e] = PLANTED ? double(T(sum[e]) + second * grad[e]) : sum[e] + double(second) * double(grad[e]);",
    ),
    "off-by-one row of a memory": bug(
        "address", "damped_lbfgs", "bfgs.cu", "kept = in.pairs - 1;", "kept = in.pairs - 1 + PLANTED;"
    ),
    "a bound on the undamped pair": bug(
        "values",
        "bfgs_bounded",
        "bfgs.cu",
        "if (theta2 != 1) {\n          const",
        "if (theta2 != 1 && !PLANTED) {\n          const",
    ),
    "no bound": bug("values", "bfgs_bounded", "bfgs.cu", "if (kDamped && in.bounded)", "if (kDamped && in.bounded && !PLANTED)"),
    "a column lost where a block has one": bug(
        "values",
        "damped_lbfgs",
        "bfgs.cu",
        "unsigned(ceil_div<int64_t>(layer.n, kThreads))",
        "unsigned(ceil_div<int64_t>(layer.n - PLANTED, kThreads))",
    ),
    "wrong element of a fragment": bug(
        "values",
        "bias_hessian_tf32",
        "bias_hessian.cu",
        "x[d + member + e / 2 * 4][row + i * 16 + e % 2 * 8]",
        "x[d + member + (PLANTED ? e % 2 : e / 2) * 4][row + i * 16 + (PLANTED ? e / 2 : e % 2) * 8]",
    ),
    "split without one of its products": bug(
        "values",
        "bias_hessian_split_tf32",
        "bias_hessian.cu",
        "            mma_m16n8k8(sum, a.large, b[j].small);\n",
        "            if (!PLANTED) mma_m16n8k8(sum, a.large, b[j].small);\n",
    ),
    "bound that lets an overflow through": bug(
        "values",
        "eacg_overflow",
        "eacg.cu",
        "bound * reach <= kLargest<T> / 8",
        "(PLANTED ? bound <= kLargest<T> : bound * reach <= kLargest<T> / 8)",
    ),
    "bound of a direction without what lies across the mean input": bug(
        "values",
        "eacg_bounded",
        "eacg.cu",
        "sqrt(c * c * across * across + squares[0])",
        "sqrt((PLANTED ? 0 : c * c * across * across) + squares[0])",
    ),
    "one layer's step size and momentum for all": bug(
        "values", "eacg_update", "eacg.cu", "const T lr = T(in.lr)", "const T lr = T(PLANTED ? layers.layer[0].in.lr : in.lr)"
    ),
    "one layer's momentum for all": bug(
        "values",
        "eacg_update",
        "eacg.cu",
        "momentum = T(in.momentum);",
        "momentum = T(PLANTED ? layers.layer[0].in.momentum : in.momentum);",
    ),
    "barriers' counters of a first launch's layers alone zeroed": bug(
        "values",
        "eacg_more_layers_than_a_launch_holds",
        "eacg.cu",
        "cudaMemsetAsync(workspace, 0, count * sizeof(unsigned), stream)",
        "cudaMemsetAsync(workspace, 0, (PLANTED ? 128 : count) * sizeof(unsigned), stream)",
    ),
    "more blocks than are resident": bug(
        "values",
        "eacg_every_plan",
        "eacg.cu",
        "if (total <= unsigned(device.multiprocessors)) break;",
        "if (total <= unsigned(device.multiprocessors) * (PLANTED ? 2 : 1)) break;",
    ),
    "a launch on another stream": bug(
        "values",
        "damped_lbfgs",
        "bfgs.cu",
        "LAUNCH((damping_kernel<true, T>), layers.count, kThreads, 0, stream",
        "LAUNCH((damping_kernel<true, T>), layers.count, kThreads, 0, PLANTED ? nullptr : stream",
    ),
    "more dynamic shared memory than was asked for": bug(
        "values", "eacg_every_plan", "eacg.cu", "  cudaFuncSetAttribute(", "  if (!PLANTED) cudaFuncSetAttribute("
    ),
    "static shared memory not deducted": bug(
        "values",
        "eacg_every_plan",
        "eacg.cu",
        "device.shared_bytes - int(sizeof(double)",
        "device.shared_bytes - (PLANTED ? 0 : 1) * int(sizeof(double)",
    ),
    "indices of 32 bits of an array": bug(
        "values",
        "indices_beyond_32_bits",
        "activation.cu",
        "const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kWidth;",
        "const int64_t i = PLANTED ? (blockIdx.x * kThreads + threadIdx.x) * kWidth\n"
        "                            : (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kWidth;",
    ),
    "indices of 32 bits of a matrix": bug(
        "values",
        "indices_beyond_32_bits",
        "bfgs.cu",
        "T* h = in.inverse_hessian + row * n;",
        "T* h = in.inverse_hessian + (PLANTED ? unsigned(row) * unsigned(n) : row * n);",
    ),
    "missing barrier between two groups of vectors": without_barrier(
        "eigen_step", "eigen.cuh", "\n      ", "  // the group before has been used"
    ),
    "missing barrier before a block's part is read": without_barrier(
        "eigen_step", "eigen.cuh", "Part<M>(layers, division);\n    "
    ),
    "missing barrier before a tile's samples are read": without_barrier(
        "eigen_step", "eigen_step.cu", "sample : -1;\n    }\n    "
    ),
    "alignment of moments not looked at": bug(
        "races",
        "eigen_step",
        "eigen_step.cu",
        "vectors = aligned(at.p, in.grad_weight, first, second, last, at.work.whole);",
        "vectors = PLANTED ? aligned(at.p, in.grad_weight) : aligned(at.p, in.grad_weight, first, second, last, at.work.whole);",
    ),
    "a lane that keeps another's sums": bug(
        "values", "eigen_step", "eigen.cuh", "const T kept = upper ?", "const T kept = upper != PLANTED ?"
    ),
    "missing barrier between two uses of a slice": without_barrier(
        "eigen_step", "eigen_step.cu", "corner_sums);\n    ", "\n    if (residual)"
    ),
    "off-by-one guard of a strip": bug(
        "address",
        "eigen_step",
        "eigen.cuh",
        "columns = int(p - column < kStrip<T> ?",
        "columns = int(p - column < kStrip<T> ? PLANTED +",
    ),
    "sums of a chunk's last tile alone": bug(
        "values",
        "eigen_step",
        "eigen.cuh",
        "at.first ? sum : *target + sum",
        "PLANTED || at.first ? sum : *target + sum",
    ),
    "one sampled row for all": bug(
        "values", "eigen_step", "eigen_step.cu", "in.sampled ? sample : -1", "in.sampled ? (PLANTED ? 0 : sample) : -1"
    ),
    "elements without a gradient that move": bug(
        "values",
        "eigen_step",
        "eigen_step.cu",
        "if (g[k] == T(0))",
        "if (!PLANTED && g[k] == T(0))",
    ),
    "a renewal's mean taken out once": bug(
        "values", "eigen_renew", "eigen_renew.cu", " - along * move + rows", " - (PLANTED ? 0 : along * move) + rows"
    ),
    "a bias Hessian's last row left out": bug(
        "values",
        "eigen_renew",
        "eigen_renew.cu",
        "  if (i >= n) return;\n  const T *const row",
        "  if (i >= n) return;\n  if (PLANTED && i == n - 1) return;\n  const T *const row",
    ),
    "off-by-one guard of a bias Hessian's rows": bug(
        "address", "eigen_renew", "eigen_renew.cu", "  if (i >= n) return;\n  if (", "  if (i >= n + PLANTED) return;\n  if ("
    ),
    "a bias Hessian that is not looked at": bug(
        "values",
        "eigen_refused",
        "eigen_renew.cu",
        "at.work.curvature[i] = square;",
        "at.work.curvature[i] = PLANTED ? 0 : square;",
    ),
    "a replay that renews bases at every step": bug(
        "values",
        "eigen_replays",
        "eigen_renew.cu",
        "replay.idle(control) ? kIdle : 0",
        "!PLANTED && replay.idle(control) ? kIdle : 0",
    ),
    "a replay with the share of the first renewal": bug(
        "values",
        "eigen_replays",
        "eigen_renew.cu",
        "replay.share(control, at.in.share, decay)",
        "PLANTED ? at.in.share : replay.share(control, at.in.share, decay)",
    ),
    "a replay with the first step's bias corrections": bug(
        "values",
        "eigen_replays",
        "eigen_passes.cuh",
        "in.step + replay.steps(control)",
        "in.step + (PLANTED ? 0 : replay.steps(control))",
    ),
    "a replay whose renewal is not due and yet refused": bug(
        "values",
        "eigen_replays_that_renew_nothing",
        "eigen_renew.cu",
        "if (*refused != kIdle &&",
        "if ((PLANTED || *refused != kIdle) &&",
    ),
    "a rate that is not looked at": bug(
        "values",
        "eigen_replays_that_renew_nothing",
        "eigen_passes.cuh",
        " && eigen_is_rate(bias_rate)",
        " && (PLANTED || eigen_is_rate(bias_rate))",
    ),
    "first moments turned the other way": bug(
        "values", "eigen_renew", "eigen_renew.cu", "row[w] * b[w * kv + v]", "row[w] * b[PLANTED ? v * kv + w : w * kv + v]"
    ),
    "one Gram-Schmidt pass": bug(
        "values", "eigen_lost_directions", "eigen_renew.cu", "if (!again) break;", "if (PLANTED || !again) break;"
    ),
    "a bias whose gradient is not looked at": bug(
        "values",
        "eigen_refused",
        "eigen_passes.cuh",
        "squares[1] += double(in.grad_bias[i]) * double(in.grad_bias[i]);",
        "squares[1] += PLANTED ? 0 : double(in.grad_bias[i]) * double(in.grad_bias[i]);",
    ),
    "barrier that not every thread reaches": bug(
        "values",
        "bfgs_update",
        "reduce.cuh",
        "partial[c][warp] = v[c];\n  }\n  __syncthreads();",
        "partial[c][warp] = v[c];\n  }\n  if (!PLANTED || warp > 0) __syncthreads();",
    ),
}
