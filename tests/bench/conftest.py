"""What the tests of sweeps start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.paper.table import Table
from tests.bench.stripes import save_stripes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the data set."""
    save_stripes(tmp_path)
    return tmp_path


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Table]:
    with Table(tmp_path / "table.db") as table:
        yield table
