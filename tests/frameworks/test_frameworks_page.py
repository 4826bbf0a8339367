"""Every snippet of docs/frameworks.md runs, and every test that the page names is there."""

import re
from pathlib import Path

import pytest
import torch
from helpers.frameworks import imported, quiet

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "frameworks.md").read_text()
SECTIONS = {
    title: text for title, text in re.findall(r"^## (.+)\n((?:(?!^## ).*\n?)*)", PAGE, re.MULTILINE) if "```python" in text
}
NEEDED = {
    "Lightning": "pytorch_lightning",
    "Hugging Face Trainer": "transformers",
    "TensorBoard and averaged models": "tensorboard",
}

pytestmark = pytest.mark.filterwarnings(*quiet.args, "ignore:secondorder. (the output of layer|no curvature covers)")


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("title", SECTIONS)
def test_the_snippets_run(title, tmp_path, monkeypatch):
    imported(NEEDED.get(title, title))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "snippet"}
    for block in blocks(PAGE.partition("\n## ")[0]) + blocks(SECTIONS[title]):
        exec(compile(block, f"frameworks.md, {title}", "exec"), names)


def test_the_tests_that_the_page_names_are_there():
    rows = [re.split(r" ?\| ?", line)[1:-1] for line in PAGE.splitlines() if line.startswith("|")]
    columns = [name.strip() for name in rows[0][1:]]
    found = 0
    for row in rows[2:]:
        assert len(row) == 1 + len(columns)
        for column, cell in zip(columns, row[1:], strict=True):
            for name in re.findall(r"`(test_\w+)`", cell):
                assert f"def {name}(" in (HERE / f"test_{column}.py").read_text()
                found += 1
    assert found > 30
