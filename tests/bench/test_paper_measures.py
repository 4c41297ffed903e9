"""Measures of networks against numbers worked out by hand and by plain numpy."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dendrite_kernels as dk
from bench.paper.datasets import ImageData, from_arrays
from bench.paper.embeddings import Embedding, embed, embed_best, neighbourhood, read
from bench.paper.measures import (
    WEIGHT_BIN,
    activities,
    hits,
    measure,
    node_measures,
    weight_measures,
    weights_of,
)
from bench.paper.result import Result
from bench.paper.run import Run
from bench.paper.splits import prepare
from bench.paper.statistics import FAMILIES
from bench.paper.training import train

RUN = Run("stripes", "dANN-R", dendrites=2, somas=6, synapses=4, epochs=1, batch=32)


def stripes(n: int = 300) -> ImageData:
    """Images of 6 x 5 pixels with a bright row that tells the class."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 6, n)
    x = rng.integers(0, 120, (n, 6, 5))
    x[np.arange(n), y] += 100
    x = x.astype(np.uint8)
    return from_arrays(x[: n // 2], y[: n // 2], x[n // 2 :], y[n // 2 :])


DATA = stripes()


def dense(module: nn.Module) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Weight [out, in] and bias of a linear module, with zeros where no synapse is."""
    assert module.bias is not None
    if isinstance(module, nn.Linear):
        return module.weight.detach().numpy(), module.bias.detach().numpy()
    c = module.connectivity
    weight = np.zeros((c.num_dendrites, c.in_features))
    rows = np.repeat(np.arange(c.num_dendrites), np.diff(c.crow_indices))
    weight[rows, c.col_indices] = module.weight.detach()
    return weight, module.bias.detach().numpy()


def leaky(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.where(x > 0, x, 0.1 * x)


def stages(model: nn.Sequential, x: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """Dendrites and somas of every layer, in numpy."""
    found = []
    for module in list(model)[:-1]:
        if isinstance(module, dk.DendriticLayer):
            dendrite, _, soma, _ = dk.interop.to_masked_dense(module)
            pairs = [dense(dendrite), dense(soma)]
        elif isinstance(module, nn.Linear | dk.SparseLinear):
            pairs = [dense(module)]
        else:
            continue
        for weight, bias in pairs:
            x = leaky(x @ weight.T + bias)
            found.append(x)
    return found


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"layers": 2, "dropout": 0.5}])
def test_all_families(kind: Any, options: Any) -> None:
    run = replace(RUN, kind=kind, **options)
    model, data = run.build(DATA), prepare(DATA, run)
    measures = measure(model, data)
    assert model.training
    assert json.loads(json.dumps(measures)) == measures
    assert len(json.dumps(measures)) < 10_000
    expected = stages(model, data.x_test.numpy().astype(np.float64))
    assert len(measures["layers"]) == run.layers
    for layer, pair in enumerate(zip(expected[::2], expected[1::2], strict=True)):
        for nodes, active in zip(("dendrites", "somas"), pair, strict=True):
            found = measures["layers"][layer][nodes]
            counts = np.stack([(active[data.y_test == c] > 0).sum(0) for c in range(6)])
            assert found["count"] == counts.shape[1]
            assert found["silent"] == int((counts.sum(0) == 0).sum())
            assert found["selectivity"]["mean"] == pytest.approx(
                np.mean((counts > 0.4 * np.bincount(data.y_test)[:, None]).sum(0)), rel=1e-5
            )
    weights = sum(
        stage["count"] for s in measures["layers"] for stage in (s["synapses"], s["cables"])
    )
    biases = sum(p.numel() for name, p in model.named_parameters() if "bias" in name)
    total = sum(p.numel() for p in model.parameters())
    assert weights + measures["output"]["count"] + biases == total


def test_activities_are_those_of_the_network() -> None:
    model = replace(RUN, layers=2).build(DATA)
    x = torch.rand(7, 30)
    found = [a.detach().numpy() for a in activities(model, x)]
    for got, expected in zip(found, stages(model, x.double().numpy()), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model[-1](torch.from_numpy(found[-1])), model(x))


def test_a_masked_dense_twin_measures_the_same() -> None:
    split = prepare(DATA, RUN)
    sparse, twin = (measure(replace(RUN, twin=t).build(DATA), split) for t in (False, True))
    assert twin["layers"][0]["dendrites"] == sparse["layers"][0]["dendrites"]
    assert twin["layers"][0]["somas"] == sparse["layers"][0]["somas"]
    assert twin["layers"][0]["synapses"]["count"] == sparse["layers"][0]["synapses"]["count"]
    assert twin["layers"][0]["synapses"]["sd"] == sparse["layers"][0]["synapses"]["sd"]


def test_entropy_and_selectivity_by_hand() -> None:
    """Ten images of two classes. Nodes: never active, always, half of class 0, all of class 0."""
    y = torch.tensor([0] * 6 + [1] * 4)
    counts = np.array([[0, 6, 3, 6], [0, 4, 0, 0]])
    measured = node_measures(counts, y)

    def bits(*ps: float) -> float:
        return -sum(p * math.log2(p) for p in ps if p > 0)

    expected = [bits(0.6, 0.4), bits(0.3, 0.7), bits(0.6, 0.4)]
    assert (measured["count"], measured["silent"]) == (4, 1)
    assert measured["entropy"]["mean"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert measured["entropy"]["sd"] == pytest.approx(np.std(expected), rel=1e-5)
    assert measured["entropy"]["histogram"] == {"start": 8, "counts": [1, 2]}  # 0.88, 0.97, 0.97
    # more than 40 %: of 6 images 3 and of 4 images 2
    assert measured["selectivity"]["histogram"] == [1, 2, 1]
    assert measured["selectivity"]["mean"] == 1.0


def test_selectivity_is_the_articles_for_its_test_sets() -> None:
    """More than 400 hits of 1,000 images."""
    y = torch.arange(10).repeat_interleave(1000)
    counts = np.zeros((10, 2), np.int64)
    counts[:3, 0], counts[3:5, 1] = 400, 401
    assert node_measures(counts, y)["selectivity"]["histogram"] == [1, 0, 1] + [0] * 8


def test_hits_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = RUN.build(DATA), prepare(DATA, RUN)
    whole = hits(model, data.x_test, data.y_test)
    monkeypatch.setattr("bench.paper.measures._BATCH", 7)
    for a, b in zip(whole, hits(model, data.x_test, data.y_test), strict=True):
        assert np.array_equal(a, b)


def test_weights_by_hand() -> None:
    measured = weight_measures(np.array([-1.0, 0.0, 0.0, 1.0], np.float32))
    assert (measured["min"], measured["max"], measured["mean"]) == (-1.0, 1.0, 0.0)
    assert measured["sd"] == pytest.approx(math.sqrt(0.5), rel=1e-5)
    assert measured["skewness"] == 0.0
    assert measured["kurtosis"] == pytest.approx(0.5 / 0.5**2 - 3)  # mean of z^4, less 3
    histogram = measured["histogram"]
    assert sum(histogram["counts"]) == 4
    assert histogram["start"] * WEIGHT_BIN == pytest.approx(-1.0, abs=WEIGHT_BIN)
    skewed = weight_measures(np.array([0.0, 0.0, 0.0, 1.0], np.float32))
    assert skewed["skewness"] == pytest.approx(2 / math.sqrt(3), rel=1e-5)


def test_weights_beyond_the_limit_are_counted() -> None:
    histogram = weight_measures(np.array([-100.0, 0.01, 100.0], np.float32))["histogram"]
    assert (histogram["counts"][0], histogram["counts"][-1]) == (1, 1)
    assert len(histogram["counts"]) == 400


def test_weights_that_have_no_distribution() -> None:
    assert weight_measures(np.full(3, 0.5, np.float32))["kurtosis"] is None
    assert weight_measures(np.zeros(0, np.float32))["min"] is None


def test_weights_are_the_trained_ones() -> None:
    model = RUN.build(DATA)
    synapses, cables, output = weights_of(model)
    assert np.array_equal(synapses, model[0].synapse_weight.detach())
    assert np.array_equal(cables, model[0].cable_weight.detach())
    assert np.array_equal(output, model[1].weight.detach().flatten())


# Embeddings


def test_neighbourhood_by_hand() -> None:
    """On a line: 0 1 2 | 10 11 12, classes a a b | b b b; two neighbours each."""
    x = np.array([0, 1, 2, 10, 11, 12], np.float32)[:, None]
    classes = np.array([0, 0, 1, 1, 1, 1])
    # the nearest two of each: (1 2) (0 2) (1 0) | (11 12) (10 12) (11 10)
    assert neighbourhood(x, classes, 2) == pytest.approx((1 + 1 + 0 + 2 + 2 + 2) / 12)


def test_an_embedding_keeps_classes_that_are_apart() -> None:
    run = replace(RUN, kind="dANN-LRF", epochs=60, lr=0.02)
    ((model, split, outcome),) = train([run], DATA)
    assert outcome.test_accuracy > 0.85
    dendrites, somas = embed(model, split, run, images=60)
    assert (dendrites.stage, somas.stage) == ("dendrites", "somas")
    assert len(somas.points) == len(somas.classes) == 60
    assert somas.neighbourhood > 0.6
    assert somas.trustworthiness > 0.8
    assert somas.silhouette > 0.3
    assert embed(model, split, run, images=60) == [dendrites, somas]


def test_embeddings_come_back_from_their_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (60, 6, 5), np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    run = replace(RUN, data="own", synapses=16, batch=128)
    results = [
        Result(replace(run, dendrites=d), train([run], from_arrays(x, y, x, y))[0].outcome)
        for d in (1, 2)
    ]
    results[1].outcome.test_accuracy = 1.0
    assert read(tmp_path) == []
    (path,) = embed_best(results, tmp_path, tmp_path)
    embeddings = read(tmp_path)
    assert [e.stage for e in embeddings] == ["dendrites", "somas"]
    assert all(isinstance(e, Embedding) and e.run == results[1].run for e in embeddings)
    assert path.parent == tmp_path
