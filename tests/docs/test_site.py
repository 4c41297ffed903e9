"""The documentation site: it builds without a warning, its links lead somewhere, it loads nothing
from the network. `make docs` builds it; this test runs where the extra [docs] is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


class Page(HTMLParser):
    """What a page loads, where it links to, and the places in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.places.add(found.get("id", ""))
        if tag == "a":
            self.links += filter(None, [found.get("href")])
        elif tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.append(found["href"])
        elif "src" in found:
            self.loads.append(found["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    for module in ("sphinx", "myst_nb", "furo"):
        pytest.importorskip(module, reason="needs the extra [docs]: run `make docs`")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going"]
    command += ["-d", str(folder / "doctrees"), str(ROOT / "docs"), str(folder / "html")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment)
    return {path: Page(path) for path in (folder / "html").rglob("*.html")}


def test_it_has_the_pages(site: dict[Path, Page]) -> None:
    names = {path.stem for path in site}
    assert names >= {path.stem for path in (ROOT / "docs").rglob("*.md")}


def test_it_loads_nothing_from_the_network(site: dict[Path, Page]) -> None:
    for path, page in site.items():
        assert not [url for url in page.loads if urlsplit(url).netloc], path.name


def test_its_links_lead_somewhere(site: dict[Path, Page]) -> None:
    for path, page in site.items():
        for url in page.links + page.loads:
            parts = urlsplit(url)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), (path.name, url)
            if parts.fragment and target in site:
                assert unquote(parts.fragment) in site[target].places, (path.name, url)
