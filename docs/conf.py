"""The documentation site: the repository's Markdown pages as they stand, and API pages from docstrings."""

import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import secondorder

project = "secondorder"
author = "The secondorder authors"
copyright = author
version = release = secondorder.__version__

# The source folder is the repository's root, so that links between pages, and to files, are those of the repository.
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "examples/*.md", "bench/*.md", "bench/results/*.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"secondorder {version}"
html_math_renderer = "mathml"
html_copy_source = False
smartquotes = False  # G' is no quotation

myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]  # as GitHub has it
suppress_warnings = ["myst.header"]  # generated tables begin below a page's second level

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures with types do not fit a line; docstrings say what an argument is
autodoc_class_signature = "mixed"

TOCTREE = """
```{toctree}
:hidden:
:caption: How to
docs/tutorial
docs/recipes
docs/install
docs/methods
docs/pinn
docs/frameworks
examples/README
```
```{toctree}
:hidden:
:caption: Reference
docs/api/optimizers
docs/api/curvature
docs/api/solvers
docs/api/criteria
docs/api/ops
docs/api/diagnostics
docs/native
docs/situations
```
```{toctree}
:hidden:
:caption: Background
docs/math
docs/results
docs/performance
bench/README
docs/cuda
docs/decisions
docs/design
CONTRIBUTING
CHANGELOG
bench/results/kbfgs_autoencoder
bench/results/no_tuning
bench/results/scales
```
"""

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")
NAME = re.compile(r"[A-Za-z]\w*(\.\w+)*$")


def inline(text: str) -> str:
    """Turns Markdown's code into reStructuredText's, names into references, and takes other marks literally."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"[*|\\]|(?<=\w)_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
    parts[1::2] = [f":py:obj:`{part}`" if NAME.match(part) else f"``{part}``" for part in parts[1::2]]
    return "".join(parts)


def to_restructuredtext(lines: list[str]) -> list[str]:
    """A docstring as it is written here: Markdown's code and indented formulas, Google's sections."""
    result: list[str] = []
    section = literal = False
    for line in lines:
        if line.startswith("|"):  # a table
            line = "    " + line
        indented = line.startswith("    ")
        if line and not indented:
            if literal and result[-1]:
                result.append("")
            section, literal = bool(SECTION.match(line)), False
        elif indented and not section and not literal:
            result += ["::", ""]
            literal = True
        result.append(line if literal else inline(line))
    return result


def process_docstring(app: Sphinx, what: str, name: str, subject: object, options: object, lines: list[str]) -> None:
    """Runs before napoleon does."""
    lines[:] = to_restructuredtext(lines)


def read_source(app: Sphinx, docname: str, content: list[str]) -> None:
    """Gives the first page the site's contents, which would be noise where the repository shows it."""
    if docname == root_doc:
        content[0] += TOCTREE


def mathml(writer: HTML5Translator, node: nodes.Element) -> None:
    """Writes a formula as MathML, which browsers show without a script."""
    writer.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def copy_first_page(app: Sphinx, exception: Exception | None) -> None:
    """Makes the first page the one that a server shows."""
    if exception is None and app.builder.format == "html":
        out = Path(app.outdir)
        (out / "index.html").write_text((out / f"{root_doc}.html").read_text())


def setup(app: Sphinx) -> None:
    """Connects the above."""
    app.connect("autodoc-process-docstring", process_docstring, priority=400)
    app.connect("source-read", read_source)
    app.connect("build-finished", copy_first_page)
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
