"""A layer in any order of training, rewiring, pruning, saving, moving and compiling, and its twin.

The twin is dense matrices under a mask, and an optimizer on them. After each step the numbers of
the layer are within rounding of the twin's; then the twin takes them, so that errors do not grow.
What moves numbers without computing must keep them bit for bit.
"""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import dendrite_kernels as dk
from dendrite_kernels import plasticity
from tests.properties import states, strategies, twins
from tests.properties.states import options_of, weight_of

OPTIMIZERS: dict[str, Any] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AMSGrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
}


class LayerMachine(RuleBasedStateMachine):
    """See the module."""

    layer: Any
    optimizer: torch.optim.Optimizer
    twin: nn.ParameterDict  # the parameters of the layer, that of the synapses as [R, N]
    twin_optimizer: torch.optim.Optimizer
    mask: Tensor  # bool [R, N]

    @initialize(
        c=strategies.networks(),
        kind=st.sampled_from([dk.DendriticLayer, dk.SparseLinear]),
        bias=st.booleans(),
        make=st.sampled_from(sorted(OPTIMIZERS)),
        slope=strategies.slopes,
        backend=st.sampled_from(["cpp", "numba", "reference"]),
        rng=strategies.generators,
    )
    def begin(
        self,
        c: dk.Connectivity,
        kind: Any,
        bias: bool,
        make: str,
        slope: float,
        backend: str,
        rng: np.random.Generator,
    ) -> None:
        self.before = dk.backends.current() if False else None
        self.make = OPTIMIZERS[make]
        self.layer = kind(c, bias=bias, negative_slope=slope, dtype=torch.float64)
        for p in self.layer.parameters():
            p.data.copy_(strategies.numbers(rng, False, *p.shape))
        self.compiled: Any = None
        self.new_optimizer()
