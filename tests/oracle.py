"""The float64 oracle, written from the equations, and the measure of error.

Independent of dendrite_kernels.reference: it computes synapse by synapse, without dense matrices.
Everything here runs on the default device of torch, because tests/gpu imports many tests to run
them there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dendrite_kernels import Connectivity

Maybe = torch.Tensor | None


def leaky_relu(u: torch.Tensor, slope: float) -> torch.Tensor:
    return torch.where(u > 0, u, slope * u)


def segment_sum(values: torch.Tensor, pointer: torch.Tensor) -> torch.Tensor:
    """values [B, pointer[-1]] -> [B, segments]: sums from pointer[i] to pointer[i + 1]."""
    segments = pointer.numel() - 1
    pointer = pointer.to(values.device)
    segment = torch.arange(segments, device=values.device)
    owner = torch.repeat_interleave(segment, pointer.long().diff())
    return values.new_zeros(values.shape[0], segments).index_add(1, owner, values)


def sparse_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: Maybe, c: Connectivity
) -> torch.Tensor:
    """x [B, N] -> u [B, R], synapse by synapse."""
    columns = c.col_indices.long().to(x.device)
    u = segment_sum(x.index_select(1, columns) * weight, c.crow_indices)
    return u if bias is None else u + bias


def dendritic_layer(
    x: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: torch.Tensor,
    soma_bias: Maybe,
    c: Connectivity,
    slope: float,
    soma_slope: float | None = None,
) -> torch.Tensor:
    """x [B, N] -> y [B, S]; somas have the slope of dendrites where none is given."""
    a = leaky_relu(sparse_linear(x, synapse_weight, dendrite_bias, c), slope)
    v = segment_sum(a * cable_weight, c.soma_ptr)
    v = v if soma_bias is None else v + soma_bias
    return leaky_relu(v, slope if soma_slope is None else soma_slope)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 norm of the difference over that of `expected` (float64); 0 for two zeros."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference: float = (actual.double() - expected.double()).norm().item()
    scale: float = expected.double().norm().item()
    return difference / scale if scale else difference


def errors(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> list[float]:
    return [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]


_ALIKE = {torch.float64: 1e-14, torch.float32: 1e-6}


def same(actual: torch.Tensor, expected: torch.Tensor, backend: str) -> bool:
    """Whether two results of one backend are equal: bit by bit, or for "reference" within rounding.

    Kernels give the same bits at any address. Matrix products of torch may not: their library
    chooses an algorithm by address, shape and processor.
    """
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    if backend != "reference":
        return torch.equal(actual, expected)
    allowed = _ALIKE.get(actual.dtype, torch.finfo(actual.dtype).eps)
    return relative_error(actual, expected) <= allowed


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=dtype, device="cpu")
    return values.to(torch.get_default_device())


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(torch.get_default_device().type, dtype=dtype)
