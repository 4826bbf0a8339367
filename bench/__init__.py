"""Microbenchmarks, the demo and the papers' experiments; never imported by the package."""
