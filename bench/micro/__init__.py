"""Micro-benchmarks: operators, whole steps and memory against plain PyTorch; `make bench` runs them all."""
