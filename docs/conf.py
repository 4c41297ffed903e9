"""The documentation site: `make docs` builds it with Sphinx into reports/docs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent

project = "dendrite_kernels"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosectionlabel",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
suppress_warnings = ["autosectionlabel.*"]  # headings that a page has twice

highlight_language = "none"
html_theme = "furo"
html_title = "dendrite_kernels"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False

myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 900  # seconds for a cell, on a busy machine too
nb_execution_show_tb = True

# ---- docstrings ----

default_role = "code"
autosectionlabel_prefix_document = True
autosectionlabel_maxdepth = 2
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
autodoc_default_options = {
    "members": True,
    "exclude-members": "cached, columns, transposed, described, extra_repr, get_extra_state, "
    "set_extra_state",  # for backends and torch
}
smartquotes = False
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Trained parameters", "Shape", "Source"]

EQUATIONS = {
    number: title
    for title, number in re.findall(
        r"^## ((\d+)\. .+)$", (DOCS / "equations.md").read_text(), re.MULTILINE
    )
}
CITATION = re.compile(r"docs/equations\.md, sections? (\d+)")
PAGE = re.compile(r"docs/([\w-]+)\.md")
CODE = re.compile(r"(`[^`]+`)")


def _as_rst(line: str) -> str:
    """A line of a docstring, which is plain text, as reStructuredText with links to pages."""
    parts = CODE.split(line)
    for i in range(0, len(parts), 2):
        text = re.sub(r"([*|])", r"\\\1", parts[i])
        text = re.sub(r"(\w)_(?=\W|$)", r"\1\\_", text)
        text = re.sub(r": ([A-Z])\.", r": \1\.", text)  # no numbered list
        text = CITATION.sub(lambda m: f":ref:`{m[0]} <equations:{EQUATIONS[m[1]]}>`", text)
        parts[i] = re.sub(f"(?<!`){PAGE.pattern}(?!,? section)", r":doc:`/\1`", text)
    return "".join(parts)


def _docstring(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Indented blocks are code, as in Markdown; the rest is text for napoleon."""
    result: list[str] = []
    block, before = False, ""  # inside an indented block; the last line with text
    for i, line in enumerate(lines):
        indented = line.startswith("    ")
        after_text = i > 0 and not lines[i - 1] and before and not before.startswith("    ")
        if indented and not block and after_text:
            result += [".. code-block:: none", ""]
            block = True
        elif line and not indented:
            block = False
        if line == "Parameters:":  # of a layer; napoleon would take them for arguments
            line = "Trained parameters:"
        if line == "Example:":
            result += [".. rubric:: Example", "", ".. code-block:: none", ""]
            block = True
            continue
        if section := re.match("(Shape|Source): (.+)", line):
            result.append(f"{section[1]}:")
            line = f"    {section[2]}"
        result.append(line if block else _as_rst(line))
        before = line or before
    lines[:] = result


# ---- links that work in the repository and on the site ----

LINK = re.compile(r"\[([^]\[]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
PAGES = {
    ROOT / "README.md": DOCS / "index.md",
    ROOT / "CONTRIBUTING.md": DOCS / "contributing.md",
    ROOT / "CHANGELOG.md": DOCS / "changelog.md",
}


def _links(text: str, folder: Path, page: Path) -> str:
    """The text of a file in `folder`, its links as they must be in `page`."""

    def link(match: re.Match[str]) -> str:
        text, path, place = match.groups(default="")
        target = (folder / path).resolve()
        if target.is_dir():
            target /= "README.md"
        target = PAGES.get(target, target)
        is_text = target.suffix == ".md" and DOCS not in target.parents
        scheme = "path:" if is_text else ""  # a file, not a page
        if text.endswith(".md") and not is_text:
            text = ""  # the title of the page
        return f"[{text}]({scheme}{os.path.relpath(target, page)}{place})"

    return LINK.sub(link, text)


def _read(app: Any, docname: str, source: list[str]) -> None:
    folder = (DOCS / docname).parent
    source[0] = _links(source[0], folder, folder)


def _included(app: Any, path: Path, parent: str, source: list[str]) -> None:
    source[0] = _links(source[0], (DOCS / path).resolve().parent, DOCS)


def setup(app: Any) -> None:
    app.connect("source-read", _read)
    app.connect("include-read", _included)
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # before napoleon
