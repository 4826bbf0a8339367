from pathlib import Path

import pytest

import secondorder as so


def pytest_collection_modifyitems(items):
    """Without the extension `ops` are the twins that these tests compare with, and check no arguments."""
    if not so.build_info()["extension"]:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="there are no kernels"))
