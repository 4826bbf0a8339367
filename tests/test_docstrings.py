"""Docstrings stand complete: every argument is described, and what several optimizers share is in the same words."""

import inspect
import re
from pathlib import Path

import pytest

import secondorder as so
from secondorder import criteria, curvature, diagnostics, ops, solvers


def public():
    """Every public class and function, each once, with the name that users know it by."""
    found = {}
    for module in (so, ops, curvature, solvers, criteria, diagnostics):
        own = [
            n for n, each in vars(module).items() if not n.startswith("_") and getattr(each, "__module__", "") == module.__name__
        ]
        for name in getattr(module, "__all__", own):
            each = getattr(module, name)
            if inspect.isclass(each) or inspect.isfunction(each):
                found.setdefault(each, f"{module.__name__}.{name}")
    return found


def methods(cls):
    return [each for name, each in vars(cls).items() if inspect.isfunction(each) and not name.startswith("_")]


def described(subject):
    """{argument: its description, in one line} of a docstring's Args."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", inspect.getdoc(subject) + "\n", re.M)
    pairs = re.findall(r"^    (?:\*{1,2})?(\w+): (.*(?:\n     .*)*)", section[1] if section else "", re.M)
    return {name: " ".join(text.split()) for name, text in pairs}


PUBLIC = {
    name: each
    for each, name in public().items()
    if not (inspect.isclass(each) and (issubclass(each, Exception) or getattr(each, "_is_protocol", False)))
}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_is_described_in_its_place(name):
    own = list(inspect.signature(PUBLIC[name]).parameters)
    assert list(described(PUBLIC[name])) == own


NEWTON = (so.LayerwiseNewton, so.KFAC, so.KFRA, so.KFLR)
SAME = [  # which classes say the same of which arguments
    (NEWTON, "lr max_factor_elements subsample average fallback maximize nonfinite"),
    (NEWTON[1:], "model curvature solver weight_decay curvature_samples"),
    (NEWTON[2:], "tau gamma factor_decay inverse_every"),
    (
        (so.LayerwiseNewton, so.EACG),
        "model criterion curvature max_cg eps_cg inverse_every max_factor_elements average maximize nonfinite",
    ),
    ((so.EACG, so.KBFGS, so.KBFGSL), "lr weight_decay nonfinite"),
    ((so.KBFGS, so.KBFGSL), " ".join(n for n in inspect.signature(so.KBFGS).parameters if n != "max_factor_dim")),
]


@pytest.mark.parametrize(("classes", "arguments"), SAME, ids=lambda given: given[0].__name__ if isinstance(given, tuple) else "")
def test_what_optimizers_share_is_in_the_same_words(classes, arguments):
    for argument in arguments.split():
        texts = {described(cls)[argument] for cls in classes}
        assert len(texts) == 1, f"{argument}: {texts}"
    after = {re.split(r"\n(?=Raises:)", inspect.getdoc(cls))[1].partition("\n\n")[0] for cls in classes}
    if so.EACG not in classes or so.KBFGS not in classes:
        assert len(after) == 1


VAGUE = re.compile(
    r"\bsee (there|above|below)\b|\bas (it does )?there\b|as (said|described) above|as for the other|\blikewise\.", re.I
)


def test_no_text_sends_the_reader_elsewhere():
    subjects = [*PUBLIC.values(), *(m for each in PUBLIC.values() if inspect.isclass(each) for m in methods(each))]
    assert not [(each, match[0]) for each in subjects if (match := VAGUE.search(inspect.getdoc(each) or ""))]


def test_numbers_begin_with_a_digit():
    root = Path(so.__file__).parents[1]
    pages = [root / "README.md", *(root / "docs").rglob("*.md"), *(root / "secondorder").rglob("*.py")]
    found = [(page.name, match[0]) for page in pages for match in re.finditer(r"(?<![\w.:,\])])\.\d+", page.read_text())]
    assert not found, found
