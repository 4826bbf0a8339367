"""The documentation holds: its programs run and print what they promise, and its links lead somewhere."""

import ast
import re
import socket
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md", "bench/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
ONE_PROGRAM = "<!-- one program -->"  # on a page whose blocks go on where the block before has ended
NOT_RUN = re.compile(r"<!-- not run: .+ -->$")  # right before a block, with the reason


def programs():
    """Every Python program of the pages: where it begins, and its source at the lines that it has on the page."""
    found = []
    for page in PAGES:
        if page.name == "frameworks.md":  # tests/frameworks runs them, where the frameworks are
            continue
        text = page.read_text()
        blocks = [
            m for m in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S) if not NOT_RUN.search(text[: m.start()].rstrip())
        ]
        for together in [blocks] if ONE_PROGRAM in text else [[block] for block in blocks]:
            source = ""
            for block in together:
                line = text[: block.start(1)].count("\n")
                source += "\n" * (line - source.count("\n")) + block[1]
            found.append(pytest.param(page, source, id=f"{page.name}:{text[: together[0].start()].count(chr(10)) + 1}"))
    return found


PROMISE = re.compile(r"# (below|above|near) (\S+)$")


@pytest.mark.parametrize(("page", "source"), programs())
def test_a_program_runs_and_prints_what_it_promises(page, source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", **address}.items():  # as torchrun sets them
        monkeypatch.setenv(name, value)
    promised = {i: PROMISE.search(line) for i, line in enumerate(source.splitlines(), 1)}
    open_promises = {i for i, promise in promised.items() if promise}

    def checked_print(value):
        line = sys._getframe(1).f_lineno
        if promise := promised[line]:
            word, bound = promise[1], float(promise[2])
            holds = {"below": value < bound, "above": value > bound, "near": abs(value - bound) < 0.1 * abs(bound)}
            assert holds[word], f"{value} is not {word} {bound}"
            open_promises.discard(line)
        print(value)

    dtype = torch.get_default_dtype()
    try:
        exec(compile(source, str(page), "exec"), {"__name__": "__main__", "print": checked_print})
    finally:
        torch.set_default_dtype(dtype)
    assert not open_promises


def without_code(page):
    """A page's text but for fenced code, and code in a line."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    return text, re.sub(r"`[^`\n]*`", "", text)


def anchors(page):
    """What a link to a part of the page may name: its headings as GitHub spells them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", without_code(page)[0], re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        anchor = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        repeated = sum(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", each) is not None for each in found)
        found.add(f"{anchor}-{repeated}" if repeated else anchor)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)[1]):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        leads_to = (page.parent / path).resolve() if path else page
        assert leads_to.is_file(), f"{target} is no file"
        assert not anchor or anchor in anchors(leads_to), f"{target}: {leads_to.name} has no such heading"


def test_the_site_has_every_page():
    listed = set(re.findall(r"^(?:docs/|examples/|bench/|[A-Z]+$)\S*", (ROOT / "docs" / "conf.py").read_text(), re.M))
    pages = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").glob("*.md"),
        *(ROOT / "bench").rglob("*.md"),
    ]
    assert listed == {str(path.relative_to(ROOT).with_suffix("")) for path in pages} - {"README"}


def test_every_message_that_a_page_explains_is_in_the_source():
    page = (ROOT / "docs" / "situations.md").read_text()
    section = page.partition("## What an error or a warning means\n")[2].partition("\n## ")[0]
    explained = [text for row in re.findall(r"^\| (`.+?) \|", section, re.M) for text in re.findall(r"`([^`]+)`", row)]
    assert len(explained) > 20
    trees = (ast.parse(path.read_text()) for path in (ROOT / "secondorder").rglob("*.py"))
    texts = [
        node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert not [text for text in explained if not any(text in each for each in texts)]


def test_every_test_that_a_page_names_is_there():
    source = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^ *def (test_\w+)\(", source, re.M))
    for page in PAGES:
        assert set(re.findall(r"`(test_\w+)`", page.read_text())) <= defined, page.name
