"""The name of an operator predicts its path in every folder, and every operator is documented, faked and specified."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

from secondorder import ops, reference

ROOT = Path(__file__).parents[1]
SCHEMAS = {
    schema.name + (f".{schema.overload_name}" if schema.overload_name else ""): schema
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith("secondorder::")
}


def stems(pattern):
    return {path.stem for path in ROOT.glob(pattern)}


def implemented(path):
    """The operators that a C++ file implements."""
    return set(re.findall(r'm\.impl\(\s*"([\w.]+)', path.read_text()))


# family -> the operators whose schemas its file in secondorder/ops has
FAMILIES = {
    path.stem: set(re.findall(r'^@operator\(\s*"([\w.]+)', path.read_text(), re.MULTILINE))
    for path in sorted((ROOT / "secondorder" / "ops").glob("[!_]*.py"))
}
# Kernels, and tests beside the family's own, may be in files by the names of operators, which have others' along with theirs.
OWNERS = {name: name for name in FAMILIES}
OWNERS |= {operator.removesuffix("_"): family for family, operators in FAMILIES.items() for operator in operators}
FAMILY = {f"secondorder::{operator}": family for family, operators in FAMILIES.items() for operator in operators}


def public_name(name):
    """`bias_hessian.chain` is bias_hessian_chain in Python; an overload for lists has no name of its own."""
    return name.removeprefix("secondorder::").removesuffix(".list").replace(".", "_")


def test_every_family_is_named_alike_in_every_folder():
    assert stems("csrc/ops/*.cpp") == set(FAMILIES)
    assert stems("secondorder/reference/[!_]*.py") - {"eigen_rows"} == set(FAMILIES)
    tests = {name.removeprefix("test_") for name in stems("tests/ops/test_*.py")}
    assert set(FAMILIES) | {"fuzz"} <= tests <= set(OWNERS) | {"fuzz"}
    glue = {name.removesuffix("_cuda") for name in stems("csrc/cuda/*.cpp")}
    assert glue <= set(FAMILIES)
    kernels = stems("csrc/cuda/*.cu")
    assert kernels <= set(OWNERS)
    assert {OWNERS[name] for name in kernels} == glue
    for path in ROOT.glob("csrc/c*/*.cpp"):  # cpu and cuda
        assert implemented(path) <= FAMILIES.get(OWNERS.get(path.stem.removesuffix("_cuda"), ""), set())


def test_both_builds_find_every_source():
    present = {path for path in ROOT.glob("csrc/**/*") if path.suffix in (".cpp", ".cu")}
    patterns = re.findall(r"csrc/\S+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text())
    assert {path for pattern in patterns for path in ROOT.glob(pattern)} == present
    setup = ROOT / "setup.py"
    (function,) = (node for node in ast.parse(setup.read_text()).body if getattr(node, "name", None) == "sources")
    namespace = {"Path": Path, "__file__": str(setup)}
    exec(compile(ast.Module([function], []), setup, "exec"), namespace)
    assert {ROOT / path for path in namespace["sources"](cuda=True)} == present
    assert {ROOT / path for path in namespace["sources"](cuda=False)} == {p for p in present if p.parent.name != "cuda"}


def test_every_schema_stands_in_the_file_of_its_family():
    assert set(FAMILY) == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_operator_is_complete(name):
    family, function, twin = FAMILY[name], getattr(ops, public_name(name)), getattr(reference, public_name(name))
    assert function.__module__ == f"secondorder.ops.{family}"
    assert [argument.name for argument in SCHEMAS[name].arguments] == list(inspect.signature(function).parameters)
    assert twin.__module__ == f"secondorder.reference.{family}"
    assert list(inspect.signature(twin).parameters) == list(inspect.signature(function).parameters)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel(name, "Meta"), "it has no fake implementation"
    assert has_kernel(name, "CompositeExplicitAutograd"), "it has nothing for devices without a kernel"
    if has_kernel(name, "CPU"):
        files = [path for path in ROOT.glob("csrc/cpu/*.cpp") if OWNERS.get(path.stem) == family]
        assert any(name.removeprefix("secondorder::") in implemented(path) for path in files)


@pytest.mark.parametrize("name", [name for name in ops.__all__ if callable(getattr(ops, name))])
def test_every_public_operator_is_typed_and_documented(name):
    function = getattr(ops, name)
    signature = inspect.signature(function)
    assert function.__doc__
    assert signature.return_annotation is not signature.empty
    assert all(parameter.annotation is not parameter.empty for parameter in signature.parameters.values())
    assert list(signature.parameters) == list(inspect.signature(getattr(reference, name)).parameters)


def test_the_operators_and_sharded_steps_alone_compute_with_the_specification():
    """Where they have no kernel; the package re-exports `reference`, for tests and benchmarks."""
    package = ROOT / "secondorder"
    for path in package.rglob("*.py"):
        if path in (package / "__init__.py", *package.glob("optim/_eigen/sharded_*.py")):
            continue
        if path.parent in (package / "ops", package / "reference"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = (getattr(node, "module", "") or "") if names else ""
            assert not any("reference" in f"{module}.{name}".split(".") for name in names), path
