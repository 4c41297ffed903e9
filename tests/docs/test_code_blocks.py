"""Every Python block of the documentation runs, the blocks of a page one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
NOTEBOOKS = sorted(set(DOCS.rglob("*.md")) - set(PAGES))  # and the pages of the API
BLOCK = re.compile(r"^```(?:python|\{code-cell\})\n(?::.*\n)*(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text())


def test_pages_have_blocks() -> None:
    assert len(PAGES) > 3
    assert sum(len(blocks(page)) for page in PAGES) >= 4


RUN = [*PAGES, *(pytest.param(page, marks=pytest.mark.slow) for page in NOTEBOOKS if blocks(page))]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize(
    "page", [*PAGES, *NOTEBOOKS, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name
)
def test_links_lead_to_files(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target
