"""Every message in docs/errors.md is one that the package raises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MESSAGES = re.findall(
    r"^\| `((?:Expected|Missing) .+?)` \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE
)
VALUE = "\0"  # in place of what a message says of its case


def _texts() -> str:
    """The texts of the package, line by line."""
    found = []
    for path in (ROOT / "dendrite_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else VALUE for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in found)


TEXTS = _texts()


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 30


@pytest.mark.parametrize("message", MESSAGES)
def test_the_package_says_so(message: str) -> None:
    parts = re.split(r"<[^>]+>", message)
    assert re.search("^" + "[^\n]+?".join(map(re.escape, parts)), TEXTS, re.MULTILINE), message
