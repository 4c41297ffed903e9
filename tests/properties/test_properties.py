"""500 cases, the same in each run; `python -m tests.properties` runs as many as you like."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.processes import output
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
    assert entries.run(name, total=500, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 3])
def test_many_cases_where_freed_memory_is_overwritten(threads: int) -> None:
    names = ["sparse_linear", "dendritic_layer", "DendriticTree"]
    arguments = ["--cases", "3000", "--threads", str(threads), "--seed", "1", "--entry", *names]
    script = f"from tests.properties.__main__ import main; assert main({arguments}) == 0"
    print(output(script, MALLOC_PERTURB_="165"))
