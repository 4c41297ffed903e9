"""500 cases, the same in each run; `python -m tests.properties` runs as many as you like."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.properties import entries


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Calls of microseconds: two threads would wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", entries.ENTRIES)
def test_property(name: str) -> None:
    counts = entries.run(name, total=500, seed=0)
    assert counts.total() > 0
