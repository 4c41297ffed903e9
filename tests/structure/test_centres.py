"""Centres of receptive fields: given ones, and the rules of dk.centres against naive statements."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import dendrite_kernels as dk
from dendrite_kernels import Connectivity
from dendrite_kernels.centres import Rule, random_limited, semirandom, serial
from tests.structure.test_connectivity import (
    Array,
    Shape,
    assert_fits,
    centres_of,
    explains,
    local,
    rows_of,
    spread,
    whole_and_sampled,
)

RULES: dict[str, Rule] = {
    "limited": random_limited(5),
    "semirandom": semirandom(),
    "serial": serial(3),
}


def drawn(rule: Rule, shape: Shape, count: int, seed: int = 0) -> Array:
    pixels = np.asarray(rule(shape, count, np.random.default_rng(seed)))
    assert pixels.shape == (count,)
    assert pixels.min() >= 0
    assert pixels.max() < shape[0] * shape[1]
    return pixels


# Given centres, and rules within the rules of connectivity


@pytest.mark.parametrize("synapses", [1, 4, 9, 16, 40])
def test_local_fields_lie_around_the_given_centres(synapses: int) -> None:
    shape, given = (6, 7), np.random.default_rng(3).integers(42, size=60)
    for values in (given, given.tolist(), torch.from_numpy(given), given.astype(np.uint64)):
        c = local(shape, 15, 4, synapses, centres=values, seed=1)
        for centre, row in zip(given.tolist(), rows_of(c), strict=True):
            whole, sampled = whole_and_sampled(centre, shape, synapses)
            assert whole <= set(row) <= whole | sampled


def test_given_centres_may_be_of_a_type_too_narrow_for_pixels() -> None:
    given = np.array([0, 255], np.uint8)
    c = local((3, 300), 2, 1, 9, centres=given, seed=1)
    assert c == local((3, 300), 2, 1, 9, centres=[0, 255], seed=1)


@pytest.mark.parametrize("dendrites", [1, 4, 9, 16])
def test_global_fields_lie_around_the_given_centres_of_somas(dendrites: int) -> None:
    shape, given = (8, 9), np.random.default_rng(3).integers(72, size=12)
    rows = rows_of(spread(shape, 12, dendrites, 16, centres=given, seed=1))
    for soma, centre in enumerate(given.tolist()):
        fields = rows[soma * dendrites : (soma + 1) * dendrites]
        assert explains(centre, shape, [centres_of(set(field), shape) for field in fields])


@pytest.mark.parametrize(("fields", "count"), [(local, 60), (spread, 15)])
def test_the_default_is_one_uniform_draw(fields: Callable[..., Connectivity], count: int) -> None:
    rng, ours = np.random.default_rng(4), np.random.default_rng(4)
    expected = fields((6, 7), 15, 4, 16, centres=rng.integers(42, size=count), seed=rng)
    assert expected == fields((6, 7), 15, 4, 16, seed=ours)
    assert rng.bit_generator.state == ours.bit_generator.state


@pytest.mark.parametrize(("fields", "count"), [(local, 60), (spread, 15)])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_draws_before_the_fields_from_their_generator(
    name: str, fields: Callable[..., Connectivity], count: int
) -> None:
    rule = RULES[name]
    rng, ours = np.random.default_rng(4), np.random.default_rng(4)
    expected = fields((6, 7), 15, 4, 16, centres=rule((6, 7), count, rng), seed=rng)
    for channels in (1, 3):
        found = fields((6, 7), 15, 4, 16, channels=channels, centres=rule, seed=4)
        pattern = expected.to_mask().repeat_interleave(channels, dim=1)
        assert torch.equal(found.to_mask(), pattern)
    assert expected == fields((6, 7), 15, 4, 16, centres=rule, seed=ours)
    assert rng.bit_generator.state == ours.bit_generator.state


def test_a_function_of_the_user_is_a_rule() -> None:
    def corner(in_shape: Shape, count: int, rng: np.random.Generator) -> list[int]:
        assert (in_shape, count) == ((6, 7), 60)
        assert isinstance(rng, np.random.Generator)
        return [41] * count

    assert set(rows_of(local((6, 7), 15, 4, 1, centres=corner))[0]) <= {33, 34, 40, 41}


# random_limited


def test_limited_centres_are_few_and_all_alike() -> None:
    pixels = drawn(random_limited(7), (9, 5), 70_000)
    places, counts = np.unique(pixels, return_counts=True)
    assert places.size == 7
    assert_fits(counts, np.full(7, 10_000.0))
    following = np.searchsorted(places, pixels[:-1]) * 7 + np.searchsorted(places, pixels[1:])
    assert_fits(np.bincount(following, minlength=49), np.full(49, 69_999 / 49))


def test_limited_places_are_distinct_and_uniform() -> None:
    rng = np.random.default_rng(0)
    counts = np.zeros(45)
    for _ in range(3000):
        pixels = np.asarray(random_limited(4)((9, 5), 100, rng))
        places = np.unique(pixels)
        assert places.size == 4  # of 100 centres none at one place: less than 1e-12
        counts[places] += 1
    z = (counts - 3000 * 4 / 45) / math.sqrt(3000 * 4 / 45 * (1 - 4 / 45))
    assert abs(z).max() < 4.5


def test_limited_by_one_place_and_by_every_pixel() -> None:
    assert np.unique(drawn(random_limited(1), (9, 5), 50)).size == 1
    assert np.unique(drawn(random_limited(45), (9, 5), 5000)).size == 45


# semirandom


def in_box(shape: Shape) -> Array:
    """[pixels]: whether the midpoint lies in the middle half of both axes, borders included."""

    def inside(place: int, size: int) -> bool:
        return Fraction(1, 4) <= (place + Fraction(1, 2)) / size <= Fraction(3, 4)

    height, width = shape
    return np.array([inside(y, height) and inside(x, width) for y in range(height)
                     for x in range(width)])  # fmt: skip


@pytest.mark.parametrize("probability", [0, 0.3, 0.7, 1])
@pytest.mark.parametrize(
    "shape", [(28, 28), (5, 9), (9, 5), (6, 7), (4, 3), (2, 2), (1, 7), (7, 1), (1, 1)]
)
def test_semirandom_centres(shape: Shape, probability: float) -> None:
    box = in_box(shape)
    p = probability * box / box.sum() + (1 - probability) / box.size
    count = 400 * box.size
    pixels = drawn(semirandom(probability), shape, count, seed=2)
    counts = np.bincount(pixels, minlength=box.size)
    assert counts[p == 0].sum() == 0
    assert_fits(counts[p > 0], count * p[p > 0])


def test_semirandom_numbers_of_the_documentation() -> None:
    rows = np.flatnonzero(in_box((28, 28)).reshape(28, 28).any(axis=1))
    assert rows.tolist() == list(range(7, 21))
    assert np.flatnonzero(in_box((5, 1))).tolist() == [1, 2, 3]
    share = in_box((28, 28))[drawn(semirandom(), (28, 28), 100_000)].mean()
    assert share == pytest.approx(0.775, abs=5 * math.sqrt(0.775 * 0.225 / 100_000))


def test_semirandom_centres_are_independent() -> None:
    pixels = drawn(semirandom(0.6), (3, 4), 100_000)
    p = 0.6 * in_box((3, 4)) / in_box((3, 4)).sum() + 0.4 / 12
    following = np.bincount(pixels[:-1] * 12 + pixels[1:], minlength=144)
    assert_fits(following, np.outer(p, p).ravel() * 99_999)


# serial


@pytest.mark.parametrize(
    ("size", "step", "places"),
    [
        (28, 4, [1, 5, 9, 13, 17, 21, 25]),
        (28, 5, [1, 6, 11, 16, 21, 26]),
        (9, 4, [0, 4, 8]),
        (10, 4, [0, 4, 8]),
        (5, 1, [0, 1, 2, 3, 4]),
        (5, 2, [0, 2, 4]),
        (6, 2, [0, 2, 4]),
        (7, 7, [3]),
        (8, 99, [3]),
        (1, 3, [0]),
    ],
)
def test_serial_grid_of_one_axis(size: int, step: int, places: list[int]) -> None:
    assert drawn(serial(step), (1, size), len(places)).tolist() == places
    assert drawn(serial(step), (size, 1), len(places)).tolist() == places
    before, after = places[0], size - 1 - places[-1]
    assert before <= after <= before + 1


@pytest.mark.parametrize("count", [1, 11, 12, 13, 40])
def test_serial_goes_row_by_row_and_starts_again(count: int) -> None:
    grid = [y * 10 + x for y in (1, 4, 7) for x in (0, 3, 6, 9)]
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    found = np.asarray(serial(3)((9, 10), count, rng)).tolist()
    assert found == [grid[i % 12] for i in range(count)]
    assert rng.bit_generator.state == before


# Networks and errors


@pytest.mark.parametrize("name", RULES)
def test_a_layer_of_each_rule_computes(name: str) -> None:
    c = local((6, 7), 5, 4, 9, centres=RULES[name], seed=0)
    assert dk.DendriticLayer(c)(torch.rand(3, 42)).shape == (3, 5)


def any_centres(value: object) -> Any:
    return value


ERRORS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: random_limited(0), ValueError, "number from 1 .* got 0"),
    (
        lambda: local((4, 4), 2, 2, 4, centres=random_limited(17)),
        ValueError,
        "number <= 16, the pixels of in_shape, got 17",
    ),
    (lambda: semirandom(1.5), ValueError, "probability from 0 to 1, got 1.5"),
    (lambda: semirandom(-0.1), ValueError, "probability from 0 to 1, got -0.1"),
    (lambda: semirandom(math.nan), ValueError, "probability from 0 to 1, got nan"),
    (lambda: serial(0), ValueError, "step from 1 .* got 0"),
    (lambda: serial(any_centres(1.0)), TypeError, "step to be an integer, got 1.0"),
    (
        lambda: local((4, 4), 2, 3, 4, centres=[0, 1]),
        ValueError,
        "centres for 6 dendrites, got 2",
    ),
    (
        lambda: spread((4, 4), 2, 3, 4, centres=range(6)),
        ValueError,
        "centres for 2 somas, got 6",
    ),
    (
        lambda: spread((4, 4), 2, 3, 4, centres=lambda *_: [1]),
        ValueError,
        "centres for 2 somas, got 1",
    ),
    (lambda: local((4, 4), 2, 1, 4, centres=[3, 16]), ValueError, "centres from 0 to 15, got 16"),
    (lambda: local((4, 4), 2, 1, 4, centres=[-1, 3]), ValueError, "centres from 0 to 15, got -1"),
    (lambda: local((4, 4), 2, 1, 4, centres=[]), ValueError, "centres for 2 dendrites, got 0"),
    (
        lambda: local((4, 4), 2, 1, 4, centres=np.zeros((2, 2), int)),
        ValueError,
        r"centres to be one-dimensional, got shape \[2, 2\]",
    ),
    (
        lambda: local((4, 4), 2, 1, 4, centres=np.array([1.0, 2.0])),
        TypeError,
        "centres of an integer type, got float64",
    ),
    (
        lambda: local((4, 4), 2, 1, 4, centres=any_centres("serial")),
        TypeError,
        "centres as pixels or a rule of dk.centres, got 'serial'",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"Expected .*{message}"):
        call()
