"""Tools: write the documentation's tables, compare stored results, soak, and report from a GPU."""
