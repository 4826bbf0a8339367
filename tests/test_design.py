"""The design page's tree is the folders' own, and modules import from below alone, without a circle."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "design.md").read_text()
SOURCES = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".inc"}


def listed():
    """The paths of the page's tree, by its indentation."""
    block = PAGE.partition("## The tree\n")[2].partition("\n`tests/test_design.py`")[0]
    found, folders = [], []
    for line in block.splitlines():
        if match := re.match(r"( +)(\S+)", line):
            depth = len(match[1]) // 2 - 2
            del folders[depth:]
            if match[2].endswith("/"):
                folders.append(match[2])
            else:
                found.append("".join(folders) + match[2])
    return found


def test_the_tree_is_the_folders_own():
    present = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "secondorder", "examples", "tests", "bench")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SOURCES and "__pycache__" not in path.parts
    }
    assert len(listed()) == len(set(listed()))
    assert set(listed()) == present


def modules():
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "secondorder").rglob("*.py")
    }


def imports(path, known):
    """The package's modules that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            names = [f"{node.module}.{alias.name}" for alias in node.names if alias.name != "_C"]  # the compiled module
            yield from (name if name in known else node.module for name in names)


def test_modules_import_from_the_layers_below():
    block = PAGE.partition("## Who imports whom\n")[2].partition("\n## ")[0]
    lines = [line.strip().split(", ") for line in block.splitlines() if line.startswith("    ")]
    layer = {name: depth for depth, names in enumerate(lines) for name in names}
    known = modules()
    parts = {name.split(".")[1] for name in known if "." in name}
    assert parts == {*layer}
    for name, path in known.items():
        if name == "secondorder":
            continue
        own = name.split(".")[1]
        for other in imports(path, known):
            assert other != "secondorder", f"{name} imports the package itself"
            theirs = other.split(".")[1]
            assert theirs == own or layer[theirs] < layer[own], f"{name} imports {other}"


def test_no_module_imports_in_a_circle():
    known = modules()
    graph = {name: set(imports(path, known)) - {name} for name, path in known.items()}
    list(TopologicalSorter(graph).static_order())


def test_nodes_are_told_apart_by_their_kind():
    """A function of one's own has the name that it likes, and so may have that of one of torch's, which `kind` tells apart."""
    package = ROOT / "secondorder"
    of_messages = {"_tape/backward_roots.py", "_tape/plans.py", "_tape/residuals.py"}
    found = {str(path.relative_to(package)) for path in package.rglob("*.py") if ".name()" in path.read_text()}
    assert found == of_messages | {"_tape/nodes.py", "criteria/autograd.py"}  # the latter for a name with colons
