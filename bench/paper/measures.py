"""What a trained network looks like inside: its weights, and which classes its nodes respond to.

Numbers and short lists only, a few kB for a network: what the table of a sweep can keep.

Source: Chavlis & Poirazi (2025), Methods; docs/equations.md, section 9.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.special import entr
from torch import Tensor, nn
from torch.nn import functional as F

import dendrite_kernels as dk
from bench.paper.splits import Split
from dendrite_kernels.benchmark.masked_dense import MaskedDendriticLayer

WEIGHT_BIN, WEIGHT_LIMIT = 0.02, 4.0  # weights beyond the limit count in the outermost bins
ENTROPY_BIN = 0.1  # bits
SELECTIVE = 0.4  # of a class's images: the article's 400 of the 1,000 that its test sets have
_BATCH = 256  # 10,000 images at once would take 1.3 GB of activities in the largest network


def measure(model: nn.Sequential, data: Split) -> dict[str, Any]:
    """Weights and nodes of a network of `dk.models`, or of a masked-dense twin.

    Returns:
        "layers": for each dendrosomatic layer the weights of "synapses" and "cables" and the nodes
        "dendrites" and "somas", as `weight_measures` and `node_measures` say; "output": weights.
    """
    *weights, output = (weight_measures(weight) for weight in weights_of(model))
    nodes = [node_measures(h, data.y_test) for h in hits(model, data.x_test, data.y_test)]
    names = "synapses", "cables", "dendrites", "somas"
    stages = zip(weights[::2], weights[1::2], nodes[::2], nodes[1::2], strict=True)
    return {
        "layers": [dict(zip(names, layer, strict=True)) for layer in stages],
        "output": output,
    }


def weights_of(model: nn.Sequential) -> Iterator[NDArray[np.float32]]:
    """The weights that exist, no biases: synapses and cables of each layer, then the output's."""
    for module in model:
        if isinstance(module, dk.DendriticLayer):
            yield _array(module.synapse_weight)
            yield _array(module.cable_weight)
        elif isinstance(module, MaskedDendriticLayer):
            yield _array(module.dendrite.weight[module.dendrite_mask != 0])
            yield _array(module.soma.weight[module.soma_mask != 0])
        elif isinstance(module, nn.Linear | dk.SparseLinear):
            yield _array(module.weight.flatten())


def activities(model: nn.Sequential, x: Tensor) -> Iterator[Tensor]:
    """Of dendrites and somas of each layer, x [B, N] -> [B, nodes]; for a model that evaluates."""
    for module in list(model)[:-1]:
        if isinstance(module, dk.DendriticLayer):
            yield module.dendrites(x)
        elif isinstance(module, MaskedDendriticLayer):
            yield F.leaky_relu(module.dendrite(x), module.negative_slope)
        x = module(x)
        if isinstance(module, dk.DendriticLayer | MaskedDendriticLayer | nn.LeakyReLU):
            yield x


@torch.no_grad()
def hits(model: nn.Sequential, x: Tensor, y: Tensor) -> list[NDArray[np.int64]]:
    """On how many samples of each class a node is active (> 0), [C, nodes] for every stage."""
    training = model.training
    model.eval()
    classes = F.one_hot(y).float()  # [n, C]
    batches = [
        [own.T @ (active > 0).float() for active in activities(model, rows)]
        for rows, own in zip(x.split(_BATCH), classes.split(_BATCH), strict=True)
    ]
    model.train(training)
    stages = zip(*batches, strict=True)
    return [torch.stack(counts).sum(0).numpy().astype(np.int64) for counts in stages]


def weight_measures(weights: NDArray[np.float32]) -> dict[str, Any]:
    """Moments (kurtosis: 0 for a normal distribution) and a histogram of bins WEIGHT_BIN wide.

    Weights that are not finite are left out: a training that diverged leaves them.
    """
    values = weights[np.isfinite(weights)].astype(np.float64)
    spread = len(values) > 0 and np.ptp(values) > 0
    bins = np.floor(np.clip(values, -WEIGHT_LIMIT, WEIGHT_LIMIT - WEIGHT_BIN / 2) / WEIGHT_BIN)
    return {
        "count": len(values),
        "min": _short(values.min()) if len(values) else None,
        "max": _short(values.max()) if len(values) else None,
        "mean": _short(values.mean()) if len(values) else None,
        "sd": _short(values.std()) if len(values) else None,
        "skewness": _short(stats.skew(values)) if spread else None,
        "kurtosis": _short(stats.kurtosis(values)) if spread else None,
        "histogram": _histogram(bins.astype(np.int64)),
    }


def node_measures(counts: NDArray[np.int64], y: Tensor) -> dict[str, Any]:
    """Entropy and selectivity from the hits [C, nodes] of nodes; y: labels of the test set.

    Entropy: p = hits / samples, with one more row for the samples that leave the node inactive;
    H = -sum p log2 p. Nodes that are never active are left out. Selectivity: the number of classes
    of whose images more than SELECTIVE make the node active; it counts all nodes.
    """
    entropy = entropies(counts, len(y))
    images = torch.bincount(y, minlength=len(counts)).numpy()[:, None]
    selectivity = (counts > SELECTIVE * images).sum(0)
    return {
        "count": counts.shape[1],
        "silent": counts.shape[1] - len(entropy),
        "entropy": {
            **_mean_sd(entropy),
            "histogram": _histogram((entropy / ENTROPY_BIN).astype(np.int64)),
        },
        "selectivity": {
            **_mean_sd(selectivity),
            "histogram": np.bincount(selectivity, minlength=len(counts) + 1).tolist(),
        },
    }


def entropies(counts: NDArray[np.int64], samples: int) -> NDArray[np.float64]:
    """Bits, of the nodes that are ever active; hits [C, nodes]."""
    awake = counts[:, counts.any(0)]
    p = np.vstack([awake, samples - awake.sum(0)]) / samples  # [C + 1, awake]
    bits: NDArray[np.float64] = entr(p).sum(0) / np.log(2)
    return bits


def _mean_sd(values: NDArray[Any]) -> dict[str, float | None]:
    if not len(values):
        return {"mean": None, "sd": None}
    return {"mean": _short(values.mean()), "sd": _short(values.std())}


def _histogram(bins: NDArray[np.int64]) -> dict[str, Any]:
    """Counts of consecutive bins, the first of which has the number `start`."""
    if not len(bins):
        return {"start": 0, "counts": []}
    start = int(bins.min())
    return {"start": start, "counts": np.bincount(bins - start).tolist()}


def _array(weight: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = weight.detach().cpu().numpy()
    return array


def _short(value: float) -> float:
    return float(f"{value:.6g}")
