"""The code blocks of docs/interop.md run, in their order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs" / "interop.md"


def test_code_blocks_run(backend: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 8
    session: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), session)
