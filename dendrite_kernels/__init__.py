"""Dendritic neural network layers for PyTorch, computed on the synapses that exist.

    import dendrite_kernels as dk

    fields = dk.connectivity.local_receptive_fields((28, 28), somas=64, dendrites=16, synapses=16)
    layer = dk.DendriticLayer(fields)  # [..., 784] -> [..., 64]

Model: Chavlis & Poirazi, Nature Communications 16:943 (2025).
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import (
    backends,
    centres,
    connectivity,
    functional,
    interop,
    models,
    optim,
    plasticity,
    reference,
)
from .backends import BackendUnavailable, backend_info, use_backend
from .estimate import MemoryEstimate, estimate_memory
from .files import load, save
from .gates import ContextGate
from .nn import DendriticLayer, KWinners, SparseLinear
from .signs import Signed
from .structure import Connectivity
from .tree import DendriticTree

if TYPE_CHECKING:
    from . import parallel
else:  # hidden from type checkers, which would take any name for granted

    def __getattr__(name: str) -> Any:
        """`parallel`, imported when first asked for: torch.distributed takes its time."""
        if name == "parallel":
            return importlib.import_module(".parallel", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "Connectivity",
    "ContextGate",
    "DendriticLayer",
    "DendriticTree",
    "KWinners",
    "MemoryEstimate",
    "Signed",
    "SparseLinear",
    "backend_info",
    "backends",
    "centres",
    "connectivity",
    "estimate_memory",
    "functional",
    "interop",
    "load",
    "models",
    "optim",
    "parallel",
    "plasticity",
    "reference",
    "save",
    "use_backend",
]
