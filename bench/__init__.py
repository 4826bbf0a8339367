"""Benchmarks: `micro` of operators and steps, the papers' `experiments`, `tools`, and the demo; the package never imports them."""
