"""What each kind of work leaves behind: no object."""

from __future__ import annotations

import collections
import gc
import weakref

import pytest
import torch

import dendrite_kernels as dk
from tests import flat_memory

TIMES = 56
# Python keeps some of these, free or not, for later use.
KEPT = {"tuple", "ReferenceType", "builtin_function_or_method", "set"}


def counted() -> collections.Counter[str]:
    gc.collect()
    return collections.Counter(type(each).__qualname__ for each in gc.get_objects())


@pytest.mark.parametrize("kind", flat_memory.KINDS)
def test_work_leaves_nothing_behind(kind: str) -> None:
    """Of those that the garbage collector sees; `python -m tests.flat_memory` looks longer, at the
    memory of the process.
    """
    work = flat_memory.KINDS[kind][0]()
    for i in range(16):
        work(i)
    before = counted()
    for i in range(16, 16 + TIMES):  # a multiple of 8: a growing layer is made anew
        work(i)
    after = counted()
    left = {name: n - before[name] for name, n in after.items() if n - before[name] >= TIMES // 2}
    assert not set(left) - KEPT, left


def test_a_dropped_layer_gives_its_connectivity_back(backend: str) -> None:
    """With the plans, topologies and tensors that backends derive from it."""
    references = []
    for _ in range(3):
        layer = dk.DendriticLayer(flat_memory.network())
        flat_memory.differentiate(layer, torch.randn(40, flat_memory.N).requires_grad_())
        references.append(weakref.ref(layer.connectivity))
    del layer
    gc.collect()
    assert [r() for r in references] == [None] * 3
