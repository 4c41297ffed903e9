"""HTML pages that need nothing else: what the reports share. Text is escaped, tags are not.

Pages are well-formed XML, so that tests and other programs can read them.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

_STYLE = Path(__file__).with_name("page.css")


def page(title: str, introduction: str, sections: Iterable[tuple[str, str]]) -> str:
    """introduction and the contents of (heading, content) are HTML."""
    body = "\n".join(
        f"<section><h2>{escape(heading)}</h2>\n{content}</section>" for heading, content in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{escape(title)}</title>
<style>
{_STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{introduction}
{body}
</main>
</body>
</html>
"""


def picture(svg: bytes, text: str) -> str:
    """An image of its own, in the page: names in it clash with no other's."""
    data = base64.b64encode(svg).decode()
    return f"<img alt='{escape(text)}' src='data:image/svg+xml;base64,{data}'/>\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["<div class='table'><table>", _row("th", head)]
    lines += [_row("td", row) for row in rows]
    return "\n".join([*lines, "</table></div>\n"])


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def bullets(items: Iterable[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{escape(item)}</li>\n" for item in items) + "</ul>\n"


def code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def details(summary: str, content: str) -> str:
    """content: HTML that is shown when asked for."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}</details>\n"


def versions(environment: Mapping[str, Any]) -> str:
    """Of an `environment.describe`, those that are known."""
    return ", ".join(f"{name} {v}" for name, v in environment["versions"].items() if v)
