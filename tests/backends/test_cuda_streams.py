"""Cached synapses of the CUDA backend meet streams and captures; no GPU takes part."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dendrite_kernels as dk
from dendrite_kernels.backends import cuda
from dendrite_kernels.backends.cuda import pack
from dendrite_kernels.backends.cuda.plan import Kind


class Recording:
    """A tensor that remembers for which streams it was recorded."""

    device = torch.device("cuda", 0)

    def __init__(self) -> None:
        self.streams: list[str] = []

    def record_stream(self, stream: str) -> None:
        self.streams.append(stream)


def test_every_other_stream_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors: list[Any] = [Recording(), Recording()]
    layout = cuda._Layout(None, tensors, 0, False, False, streams={7})
    current = SimpleNamespace(name="7")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current.name)
    for stream in (7, 8, 8, 9, 7, 9):
        current.name = str(stream)
        assert layout.on(stream) is layout
    assert [t.streams for t in tensors] == [["8", "9"]] * 2


def test_a_first_call_in_a_capture_is_an_error_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(cuda, "_stream", lambda device: 7)
    c = dk.connectivity.random(20, 2, 3, 4, seed=0)
    with pytest.raises(RuntimeError, match="Expected a call with a batch of this size before"):
        cuda._rows(c, torch.device("cuda", 0), Kind(1, 1, False), True, 7)
    assert not any("cuda" in str(key) for key in c.derived)


def test_the_packing_is_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """All arrays of a packing go to the device, and the layout holds them for the allocator."""
    given: list[Any] = []
    extension = SimpleNamespace(Packed=lambda *arguments: given.extend(arguments))
    monkeypatch.setattr(cuda, "_load", lambda: (extension, None))
    monkeypatch.setattr(cuda, "_stream", lambda device: 7)
    c = dk.connectivity.random(20, 2, 3, 4, seed=0)
    packing, kind = pack.pack_columns(c, Kind(2, 4, True), True, True), Kind(2, 4, True)
    layout = cuda._upload(packing, kind, 20, 20, torch.device("cpu"))
    tensors = [a for a in given if isinstance(a, torch.Tensor)]
    assert len(tensors) == 7
    assert all(a is b for a, b in zip(layout.tensors, tensors, strict=True))
