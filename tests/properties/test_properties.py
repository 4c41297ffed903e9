"""500 cases, the same in each run; `python -m tests.properties` runs as many as you like."""

from __future__ import annotations

import pytest

from tests.properties import entries


@pytest.mark.parametrize("name", entries.ENTRIES)
def test_property(name: str) -> None:
    counts = entries.run(name, total=500, seed=0)
    assert counts.total() > 0
