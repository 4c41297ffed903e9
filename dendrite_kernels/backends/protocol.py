"""What a backend is: one pair of functions, forward and backward, and what they take."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from ..structure import Connectivity

Maybe = torch.Tensor | None
Slopes = tuple[float, float]  # of the leaky ReLUs of dendrites and of somas
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Operands(NamedTuple):
    """A layer as the kernels see it. N inputs, R dendrites, S somas; contiguous tensors.

    Without a cable it is a sparse linear layer: its outputs are the R dendrites themselves, both
    slopes are 1, and somas play no part.
    """

    synapse_weight: torch.Tensor  # [nnz]
    dendrite_bias: Maybe  # [R]
    cable_weight: Maybe  # [R]
    soma_bias: Maybe  # [S]
    connectivity: Connectivity
    negative_slope: float  # of the dendrites' leaky ReLU
    soma_slope: float  # of the somas', >= 0: the sign of y must stand for that of their sums


class AdamStep(NamedTuple):
    """A step of torch.optim.Adam, or AdamW, that a backend takes where it has the gradient of the
    synapse weights; the tensors are those of the optimizer's state.
    """

    exp_avg: torch.Tensor  # [nnz], contiguous, of the weight's dtype
    exp_avg_sq: torch.Tensor  # like it
    step: torch.Tensor  # float32 []: steps taken before this one; the caller counts it
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool  # the weight decays, not its gradient: AdamW


class Backend(Protocol):
    """The functions of a backend. B samples; contiguous tensors; y is [B, S], or [B, R] without a
    cable.
    """

    # Takes x, y and their gradients as bfloat16 and float16, then with float32 parameters; of the
    # others, all tensors of a call are float32 or all float64.
    STORES_LOW: bool
    # Rounds x to bfloat16 on its way into the synapses where asked; others are never asked.
    ROUNDS_X: bool
    # Whether backward takes an AdamStep; others are never given one.
    STEPS: bool

    def unavailable(self) -> str | None:
        """Why this backend cannot serve here, or None if it can."""

    def info(self) -> dict[str, Any]:
        """What it runs on: ISA, threads, versions."""

    def forward(
        self, x: torch.Tensor, operands: Operands, save_signs: bool, round_x: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, N] -> y and sign words int32 [ceil(B / 32), R], or [0, R] unless save_signs.

        Bit i of signs[t, r] says that u[32 t + i, r] > 0; bits past B are unspecified. Signs are
        only saved with a cable.
        """

    def backward(
        self,
        grad: torch.Tensor,  # like y
        x: torch.Tensor,  # [B, N]
        y: Maybe,  # None without a cable
        signs: Maybe,
        operands: Operands,
        need_x: bool,
        step: AdamStep | None = None,
    ) -> Gradients:
        """dx [B, N] ([0, N] unless need_x), and of the parameters: dw [nnz], dbd [R], dc [R],
        dbs [S]; dc and dbs are [0] without a cable.

        With a step the synapse weight is stepped in place, once all gradients are computed, and dw
        is [0].
        """
