"""The mark of tests of what the kernels alone do: they check their arguments, and give the same bits at any number of threads."""

import pytest

import secondorder as so

needs_kernels = pytest.mark.skipif(not so.build_info()["extension"], reason="there are no kernels")
