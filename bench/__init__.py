"""Benchmarks: `micro` of operators and steps, the papers' `experiments`, `tools`, the demo; never imported by the package."""
