"""Who is compared: the package's backends, and what a user could pick instead."""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import dendrite_kernels as dk

from ..backends import BackendName
from .dense import BlockSumCable, MaskedDense, OfficialMaskedDense
from .peer import Peer
from .problem import Problem
from .sparse import Compiled, CompiledEmbeddingBag, CompiledGather, EmbeddingBag, ScipyCsr, TorchCsr

OURS, OFFICIAL = "dendrite_kernels cpp", "masked dense, official"
_MEMORY_SHARE = 0.7  # of what the machine has available


class _Package(Peer):
    """The package itself, through its public function."""

    backend: BackendName

    def surroundings(self) -> AbstractContextManager[object]:
        return dk.use_backend(self.backend)

    def layer(self, x: Tensor) -> Tensor:
        p, parameters = self.problem, cast(Any, self.leaves)
        return dk.functional.dendritic_layer(
            x, connectivity=p.connectivity, negative_slope=p.negative_slope, **parameters
        )


class Cpp(_Package):
    backend, device = "cpp", "cpu"


class Numba(_Package):
    backend, device = "numba", "cpu"


class Cuda(_Package):
    backend, device = "cuda", "cuda"


class Reference(_Package):
    backend = "reference"

    @staticmethod
    def bytes_needed(problem: Problem) -> int:
        return BlockSumCable.bytes_needed(problem)


PEERS: dict[str, type[Peer]] = {
    OURS: Cpp,
    "dendrite_kernels numba": Numba,
    "dendrite_kernels cuda": Cuda,
    "dendrite_kernels reference": Reference,
    OFFICIAL: OfficialMaskedDense,
    "masked dense, float masks": MaskedDense,
    "masked dense + block-sum cable": BlockSumCable,
    "torch CSR by hand": TorchCsr,
    "embedding_bag": EmbeddingBag,
    "embedding_bag, compiled": CompiledEmbeddingBag,
    "gather, compiled": CompiledGather,
    "scipy CSR": ScipyCsr,
}
PACKAGE = tuple(name for name, peer in PEERS.items() if issubclass(peer, _Package))
DENSE = tuple(
    name for name, peer in PEERS.items() if issubclass(peer, (MaskedDense, BlockSumCable))
)


def reason_to_skip(name: str, problem: Problem) -> str | None:
    """Why this machine cannot run the peer, or None."""
    peer, device = PEERS[name], problem.x.device.type
    if peer.device not in (None, device):
        return f"runs on {peer.device} only"
    if issubclass(peer, _Package):
        entry = dk.backend_info()[peer.backend]
        if not entry["available"]:
            return str(entry["reason"])
    if issubclass(peer, ScipyCsr) and find_spec("scipy") is None:
        return "scipy is not installed"
    if issubclass(peer, Compiled) and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile needs a C++ compiler"
    needed = peer.bytes_needed(problem) * problem.x.itemsize // 4
    available = available_bytes() if device == "cpu" else torch.cuda.mem_get_info(device)[0]
    if available is not None and needed > _MEMORY_SHARE * available:
        return f"needs about {needed / 2**30:.1f} of {available / 2**30:.1f} GiB"
    return None


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(s.split()[1]) for s in lines if s.startswith("MemAvailable:")), None)
