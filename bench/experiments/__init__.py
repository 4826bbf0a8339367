"""The papers' experiments: `python -m bench.experiments NAME`."""
