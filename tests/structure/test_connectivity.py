"""The connectivity rules against independent, naive statements of what the paper says."""

from __future__ import annotations

import functools
import itertools
import math
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from dendrite_kernels import centres, connectivity
from dendrite_kernels.structure import Connectivity

Array = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int, int]

local = connectivity.local_receptive_fields
spread = connectivity.global_receptive_fields
random, all_to_all, one_to_one = (
    connectivity.random,
    connectivity.all_to_all,
    connectivity.one_to_one,
)


def rows_of(c: Connectivity) -> list[list[int]]:
    return [row.tolist() for row in np.split(c.col_indices.numpy(), c.crow_indices.numpy()[1:-1])]


def check_sizes(c: Connectivity, somas: int, dendrites: int, synapses: int | None) -> None:
    assert c.num_somas == somas
    assert c.num_dendrites == somas * dendrites
    assert c.dendrites_per_soma == dendrites
    assert c.soma_ptr.tolist() == list(range(0, somas * dendrites + 1, dendrites))
    assert c.fan_in == synapses


# Random inputs: one draw for the layer


@pytest.mark.parametrize(
    ("inputs", "somas", "dendrites", "synapses"),
    [
        (1, 1, 1, 1),
        (5, 2, 3, 5),
        (7, 3, 1, 2),
        (784, 32, 4, 16),
        (784, 16, 2, 400),
        (3000, 8, 4, 16),
    ],
)
def test_random_is_the_official_draw(
    inputs: int, somas: int, dendrites: int, synapses: int
) -> None:
    rows = somas * dendrites
    rng, ours = np.random.default_rng(11), np.random.default_rng(11)
    for _ in range(2):  # two layers from one generator, as the official code consumes it
        mask = np.zeros((inputs, rows), bool)
        mask.flat[rng.choice(inputs * rows, size=synapses * rows, replace=False)] = True
        c = connectivity.random(inputs, somas, dendrites, synapses, seed=ours)
        assert np.array_equal(c.to_mask().numpy(), mask.T)
        assert c.nnz == synapses * rows
        assert c.soma_ptr.tolist() == list(range(0, rows + 1, dendrites))
    assert rng.bit_generator.state == ours.bit_generator.state
    again = connectivity.random(inputs, somas, dendrites, synapses, seed=11)
    assert again == connectivity.random(
        inputs, somas, dendrites, synapses, seed=np.random.default_rng(11)
    )


def test_random_fan_in_varies_as_the_paper_says() -> None:
    c = connectivity.random(784, 512, 16, 16, seed=0)
    fan_in = np.diff(c.crow_indices.numpy())
    assert fan_in.mean() == 16
    assert fan_in.std() == pytest.approx(4, abs=0.1)
    assert 0 <= fan_in.min() <= 4
    assert 30 <= fan_in.max() <= 42


def test_random_needs_no_memory_for_synapses_that_do_not_exist() -> None:
    tracemalloc.start()
    try:
        c = connectivity.random(4096, 4096, 16, 32, seed=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert c.nnz == 2**21
    assert peak < 48 * c.nnz  # one byte for each possible synapse would be 128


# Random inputs with constant fan-in


@pytest.mark.parametrize(
    ("inputs", "synapses"),
    [
        (1, 1),
        (2, 1),
        (2, 2),
        (9, 3),
        (9, 4),
        (50, 50),
        (784, 1),
        (784, 16),
        (784, 700),
        (70_000, 40),
    ],
)
def test_constant_fan_in(inputs: int, synapses: int) -> None:
    c = connectivity.random(inputs, 6, 7, synapses, constant_fan_in=True, seed=4)
    check_sizes(c, 6, 7, synapses)
    assert c == connectivity.random(inputs, 6, 7, synapses, constant_fan_in=True, seed=4)
    if synapses < inputs and inputs > 2:
        assert c != connectivity.random(inputs, 6, 7, synapses, constant_fan_in=True, seed=5)


@pytest.mark.parametrize(("inputs", "synapses"), [(6, 1), (6, 2), (9, 3), (6, 3), (6, 5), (7, 4)])
def test_constant_fan_in_makes_every_set_equally_likely(inputs: int, synapses: int) -> None:
    c = connectivity.random(inputs, 5000, 4, synapses, constant_fan_in=True, seed=1)
    sets = dict.fromkeys(itertools.combinations(range(inputs), synapses), 0)
    for row in rows_of(c):
        sets[tuple(row)] += 1
    assert_fits(np.array(list(sets.values())), np.full(len(sets), c.num_dendrites / len(sets)))


@pytest.mark.parametrize(("inputs", "synapses"), [(784, 16), (784, 60)])
def test_constant_fan_in_treats_inputs_alike(inputs: int, synapses: int) -> None:
    rows = 12_000
    c = connectivity.random(inputs, rows, 1, synapses, constant_fan_in=True, seed=2)
    counts = np.bincount(c.col_indices.numpy(), minlength=inputs)
    p = synapses / inputs
    z = (counts - rows * p) / math.sqrt(rows * p * (1 - p))
    assert abs(z).max() < 5
    assert 0.85 < z.std() < 1.15


@pytest.mark.parametrize("synapses", [5, 20])
def test_constant_fan_in_in_chunks(synapses: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connectivity, "_CHUNK", 64)
    c = connectivity.random(30, 101, 1, synapses, constant_fan_in=True, seed=2)
    check_sizes(c, 101, 1, synapses)
    assert len({tuple(row) for row in rows_of(c)}) > 90


def assert_fits(observed: Array, expected: Array) -> None:
    """Chi-squared statistic within six standard deviations of what it should be."""
    freedom = observed.size - 1
    if freedom:
        statistic = float(((observed - expected) ** 2 / expected).sum())
        assert abs(statistic - freedom) < 6 * math.sqrt(2 * freedom), statistic


# Receptive fields, stated naively


@functools.cache
def whole_and_sampled(centre: int, shape: Shape, count: int) -> tuple[set[int], set[int]]:
    """The pixels around a centre that `count` certainly includes, and those it samples from."""
    height, width = shape
    y0, x0 = divmod(centre, width)
    ring_of = {
        y * width + x: max(abs(y - y0), abs(x - x0), 1) for y in range(height) for x in range(width)
    }  # the 3 x 3 block is ring 1
    whole: set[int] = set()
    for number in range(1, max(shape) + 1):
        ring = {pixel for pixel, r in ring_of.items() if r == number}
        if len(whole) + len(ring) > count:
            return whole, ring
        whole |= ring
    return whole, set()


def centres_of(field: set[int], shape: Shape) -> set[int]:
    """The centres around which a field of this size may be."""
    found = set()
    for centre in range(shape[0] * shape[1]):
        whole, sampled = whole_and_sampled(centre, shape, len(field))
        if whole <= field <= whole | sampled:
            found.add(centre)
    return found


CASES: list[tuple[Shape, int, int, int]] = [
    ((28, 28), 6, 4, 16), ((5, 9), 20, 3, 7), ((9, 5), 20, 3, 9), ((8, 4), 10, 5, 16),
    ((6, 7), 15, 16, 1), ((6, 7), 15, 9, 4), ((3, 3), 4, 9, 9), ((2, 6), 5, 12, 11),
    ((7, 1), 6, 7, 3), ((1, 7), 6, 2, 6), ((1, 1), 3, 1, 1), ((12, 10), 5, 30, 26),
    ((10, 12), 3, 64, 60), ((16, 16), 4, 2, 256),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "somas", "dendrites", "synapses"), CASES)
def test_local_fields(shape: Shape, somas: int, dendrites: int, synapses: int) -> None:
    c = local(shape, somas, dendrites, synapses, seed=7)
    check_sizes(c, somas, dendrites, synapses)
    assert c.in_features == shape[0] * shape[1]
    assert c.in_shape == shape
    for row in rows_of(c):
        assert centres_of(set(row), shape), row


@pytest.mark.parametrize(("shape", "somas", "dendrites", "synapses"), CASES)
def test_global_fields(shape: Shape, somas: int, dendrites: int, synapses: int) -> None:
    c = spread(shape, somas, dendrites, synapses, seed=7)
    check_sizes(c, somas, dendrites, synapses)
    assert c.in_shape == shape
    rows = rows_of(c)
    for soma in range(somas):
        fields = [set(row) for row in rows[soma * dendrites : (soma + 1) * dendrites]]
        candidates = [centres_of(field, shape) for field in fields]
        pixels = range(shape[0] * shape[1])
        assert any(explains(centre, shape, candidates) for centre in pixels), soma


def explains(soma_centre: int, shape: Shape, candidates: list[set[int]]) -> bool:
    """Whether dendrites with these candidate centres may belong to a soma centred here.

    They may if some choice of distinct centres takes all certain pixels and otherwise sampled ones:
    by Mendelsohn and Dulmage, if one matching serves all dendrites and one all certain pixels.
    """
    whole, sampled = whole_and_sampled(soma_centre, shape, len(candidates))
    allowed = sorted(whole | sampled)
    fits = np.array([[pixel in c for pixel in allowed] for c in candidates])
    certain = np.array([pixel in whole for pixel in allowed])
    if not certain.any():
        return matched(fits) == len(candidates)
    return matched(fits) == len(candidates) and matched(fits[:, certain]) == certain.sum()


def matched(fits: Array) -> int:
    return int((maximum_bipartite_matching(csr_array(fits), perm_type="column") >= 0).sum())


def inclusion(shape: Shape, count: int) -> Array:
    """[centre, pixel]: the probability that a sample of `count` around the centre has the pixel."""
    pixels = shape[0] * shape[1]
    p = np.zeros((pixels, pixels))
    for centre in range(pixels):
        whole, sampled = whole_and_sampled(centre, shape, count)
        p[centre, list(whole)] = 1
        if sampled:
            p[centre, list(sampled)] = (count - len(whole)) / len(sampled)
    return p


def assert_synapse_counts(c: Connectivity, expected: Array) -> None:
    """Mean synapses of a soma on each pixel against `expected`, in standard errors over somas."""
    assert c.dendrites_per_soma is not None
    counts = np.zeros((c.num_somas, c.in_features))
    rows = np.repeat(np.arange(c.num_dendrites), np.diff(c.crow_indices.numpy()))
    np.add.at(counts, (rows // c.dendrites_per_soma, c.col_indices.numpy()), 1)
    error = counts.std(axis=0) / math.sqrt(c.num_somas)
    assert (abs(counts.mean(axis=0) - expected) <= 4.5 * error + 1e-12).all()


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 4)])
@pytest.mark.parametrize("synapses", [1, 3, 5, 9, 12, 15])
def test_local_fields_are_uniform(shape: Shape, synapses: int) -> None:
    c = local(shape, 6000, 2, synapses, seed=3)
    assert_synapse_counts(c, 2 * inclusion(shape, synapses).mean(axis=0))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
@pytest.mark.parametrize(("dendrites", "synapses"), [(1, 1), (4, 5), (9, 1), (12, 3), (16, 12)])
def test_global_fields_are_uniform(shape: Shape, dendrites: int, synapses: int) -> None:
    c = spread(shape, 6000, dendrites, synapses, seed=3)
    per_centre = inclusion(shape, dendrites) @ inclusion(shape, synapses)
    assert_synapse_counts(c, per_centre.mean(axis=0))


def test_local_dendrites_are_independent() -> None:
    c = local((2, 3), 20_000, 2, 1, seed=3)
    first, second = c.col_indices.numpy().reshape(-1, 2).T
    joint = np.bincount(first * 6 + second, minlength=36)
    alone = inclusion((2, 3), 1).mean(axis=0)
    assert_fits(joint, np.outer(alone, alone).ravel() * 20_000)
    following = np.bincount(second[:-1] * 6 + first[1:], minlength=36)
    assert_fits(following, np.outer(alone, alone).ravel() * 19_999)


@pytest.mark.parametrize("rule", [local, spread])
@pytest.mark.parametrize("channels", [2, 3])
def test_channels_repeat_the_pattern(rule: Callable[..., Connectivity], channels: int) -> None:
    grey = rule((6, 7), 5, 4, 16, seed=9)
    c = rule((6, 7), 5, 4, 16, channels=channels, seed=9)
    assert c.in_shape == (6, 7, channels)
    assert c.in_features == 42 * channels
    check_sizes(c, 5, 4, 16 * channels)
    expected = grey.to_mask().repeat_interleave(channels, dim=1)
    assert (c.to_mask() == expected).all()


@pytest.mark.parametrize("rule", [local, spread])
def test_channels_first(rule: Callable[..., Connectivity]) -> None:
    """The same pixels of the same draw, at c * H * W + row * W + column."""
    last = rule((6, 7), 5, 4, 16, channels=3, seed=9)
    first = rule((6, 7), 5, 4, 16, channels=3, channels_first=True, seed=9)
    assert (last.channels_first, first.channels_first) == (False, True)
    assert (last.in_shape, first.in_shape) == ((6, 7, 3), (3, 6, 7))
    images = last.to_mask().unflatten(1, (6, 7, 3)).movedim(3, 1)
    assert torch.equal(images, first.to_mask().unflatten(1, (3, 6, 7)))
    assert rule((6, 7), 5, 4, 16, channels_first=True, seed=9).in_shape == (6, 7)  # one channel


# Every rule that draws; each makes 20 somas of 16 dendrites.
RULES: dict[str, Callable[..., Connectivity]] = {
    "random": partial(random, 784, 20, 16, 16),
    "constant fan-in": partial(random, 784, 20, 16, 16, constant_fan_in=True),
    "local": partial(local, (28, 28), 20, 16, 16),
    "global": partial(spread, (28, 28), 20, 16, 16),
    "local, limited": partial(local, (28, 28), 20, 16, 16, centres=centres.random_limited(9)),
    "local, semirandom": partial(local, (28, 28), 20, 16, 16, centres=centres.semirandom()),
    "local, serial": partial(local, (28, 28), 20, 16, 16, centres=centres.serial(3)),
    "global, semirandom": partial(spread, (28, 28), 20, 16, 16, centres=centres.semirandom()),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_depend_on_the_seed_only(name: str) -> None:
    rule = RULES[name]
    c = rule(seed=1)
    assert c.soma_ptr.tolist() == list(range(0, 321, 16))
    assert c == rule(seed=np.random.default_rng(1))
    assert c != rule(seed=2)
    assert rule() != rule()
    rng = np.random.default_rng(1)
    assert rule(seed=rng) != rule(seed=rng)


@pytest.mark.parametrize("name", [name for name in RULES if name.startswith(("local", "global"))])
def test_fields_do_not_depend_on_how_the_work_is_cut(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = RULES[name](seed=1)
    monkeypatch.setattr(connectivity, "_CHUNK", 100)
    assert c == RULES[name](seed=1)


def test_local_and_global_fields_spread_as_named() -> None:
    def spread_of(c: Connectivity) -> float:
        y = c.col_indices.numpy().reshape(64, -1) // 28
        return float(y.std(axis=1).mean())

    assert spread_of(spread((28, 28), 64, 16, 16, seed=0)) < 3
    assert spread_of(local((28, 28), 64, 16, 16, seed=0)) > 6


def test_deep_layer_on_the_pseudo_image() -> None:
    shape = connectivity.pseudo_image(32)
    for rule in (local, spread):
        c = rule(shape, 32, 16, 16, seed=0)
        assert c.in_features == 32
        check_sizes(c, 32, 16, 16)
    with pytest.raises(ValueError, match=r"Expected dendrites <= 32, the pixels .* got 64"):
        spread(shape, 32, 64, 16, seed=0)


# One to one, dense inputs, pseudo-images, errors


@pytest.mark.parametrize(("somas", "dendrites"), [(1, 1), (6, 1), (1, 6), (3, 2), (28, 28)])
def test_one_to_one(somas: int, dendrites: int) -> None:
    c = one_to_one(somas * dendrites, somas, dendrites)
    check_sizes(c, somas, dendrites, 1)
    assert np.array_equal(c.to_mask().numpy(), np.eye(somas * dendrites, dtype=bool))


def test_all_to_all() -> None:
    c = connectivity.all_to_all(7, 3, 2)
    check_sizes(c, 3, 2, 7)
    assert c.is_dense
    assert c.to_mask().all()
    assert connectivity.all_to_all(1, 1, 1).nnz == 1


@pytest.mark.parametrize(
    ("features", "shape"),
    [
        (1, (1, 1)), (2, (2, 1)), (7, (7, 1)), (12, (4, 3)), (32, (8, 4)), (36, (6, 6)),
        (64, (8, 8)), (97, (97, 1)), (128, (16, 8)), (256, (16, 16)), (512, (32, 16)),
        (784, (28, 28)),
    ],
)  # fmt: skip
def test_pseudo_image(features: int, shape: Shape) -> None:
    assert connectivity.pseudo_image(features) == shape


@pytest.mark.parametrize("features", range(1, 200))
def test_pseudo_image_is_the_middle_pair_of_divisors(features: int) -> None:
    divisors = [d for d in range(1, features + 1) if features % d == 0]
    expected = divisors[len(divisors) // 2], divisors[(len(divisors) - 1) // 2]
    assert connectivity.pseudo_image(features) == expected


def as_any(value: object) -> Any:
    return value


ERRORS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: random(10, 2, 2, 11), ValueError, "synapses <= 10, in_features, got 11"),
    (lambda: random(10, 2, 2, 11, constant_fan_in=True), ValueError, "synapses <= 10"),
    (lambda: random(10, 2, 2, 0), ValueError, "synapses from 1 .* got 0"),
    (lambda: random(10, 2, 0, 1), ValueError, "dendrites from 1 .* got 0"),
    (lambda: random(10, -1, 2, 1), ValueError, "somas from 1 .* got -1"),
    (lambda: random(0, 2, 2, 1), ValueError, "in_features from 1 .* got 0"),
    (lambda: random(10, 2, as_any(2.0), 1), TypeError, "dendrites to be an integer, got 2.0"),
    (lambda: local(as_any(784), 2, 2, 1), TypeError, r"in_shape \(H, W\), got 784"),
    (lambda: random(10**6, 10**4, 10**4, 100), ValueError, r"2\*\*31 synapses, got 10000000000"),
    (lambda: all_to_all(10**6, 10**3, 10), ValueError, r"2\*\*31 synapses, got 10000000000"),
    (lambda: all_to_all(0, 1, 1), ValueError, "in_features from 1"),
    (lambda: one_to_one(8, 3, 3), ValueError, "somas \\* dendrites == 8, in_features, got 9"),
    (lambda: one_to_one(10, 3, 3), ValueError, "somas \\* dendrites == 10, in_features, got 9"),
    (lambda: one_to_one(0, 1, 1), ValueError, "in_features from 1"),
    (lambda: local((4, 4), 2, 2, 17), ValueError, "synapses <= 16, the pixels of in_shape, got 17"),
    (lambda: spread((4, 4), 2, 2, 17), ValueError, "synapses <= 16"),
    (lambda: spread((4, 4), 2, 17, 3), ValueError, "dendrites <= 16, the pixels .* got 17"),
    (lambda: local((4, 4, 3), 2, 2, 4), ValueError, r"in_shape \(H, W\), got \(4, 4, 3\)"),
    (lambda: spread((4, 0), 2, 2, 4), ValueError, "in_shape from 1 .* got 0"),
    (lambda: local((4, 4), 2, 2, 4, channels=0), ValueError, "channels from 1 .* got 0"),
    (lambda: local((4, 4), 2**15, 2**12, 16, channels=3), ValueError, "got 6442450944"),
    (lambda: local((2**16, 2**16), 2, 2, 4), ValueError, "height .* got 4294967296"),
    (lambda: connectivity.pseudo_image(0), ValueError, "features from 1 .* got 0"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"Expected .*{message}"):
        call()


def test_local_fields_allow_more_dendrites_than_pixels() -> None:
    check_sizes(local((2, 2), 3, 9, 2, seed=0), 3, 9, 2)


@pytest.mark.slow
def test_a_million_dendrites() -> None:
    tracemalloc.start()
    try:
        c = connectivity.random(65536, 65536, 16, 32, constant_fan_in=True, seed=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    check = c.col_indices.numpy().reshape(-1, 32)
    assert c.num_dendrites == 2**20
    assert (np.diff(check, axis=1) > 0).all()
    assert peak < 3 * check.nbytes


def test_a_chain_joins_consecutive_inputs() -> None:
    c = connectivity.chain([0, 2, 2, 5])
    assert c == Connectivity.from_csr([0, 2, 2, 5], [0, 1, 2, 3, 4], 5)
    assert (c.num_dendrites, c.num_somas, c.nnz) == (3, 3, 5)
    for ptr, message in [
        ([0, 3, 2, 5], "Expected ptr not to decrease, got 3 then 2 at row 1"),
        ([1, 3], "Expected ptr to start at 0, got 1"),
        ([0, 0], "Expected the end of ptr from 1 to"),
        ([0], "Expected the end of ptr from 1 to"),
        ([], "Expected the end of ptr from 1 to"),
        ([0.0, 2.0], "Expected ptr of an integer type"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            connectivity.chain(ptr)
