"""Dendritic neural network layers for PyTorch, computed on the synapses that exist.

    import dendrite_kernels as dk

    fields = dk.connectivity.local_receptive_fields((28, 28), somas=64, dendrites=16, synapses=16)
    layer = dk.DendriticLayer(fields)  # [..., 784] -> [..., 64]

Model: Chavlis & Poirazi, Nature Communications 16:943 (2025).
"""

from . import backends, connectivity, functional, interop, models, optim, reference
from .backends import BackendUnavailable, backend_info, use_backend
from .files import load, save
from .nn import DendriticLayer, SparseLinear
from .signs import Signed
from .structure import Connectivity

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "Connectivity",
    "DendriticLayer",
    "Signed",
    "SparseLinear",
    "backend_info",
    "backends",
    "connectivity",
    "functional",
    "interop",
    "load",
    "models",
    "optim",
    "reference",
    "save",
    "use_backend",
]
