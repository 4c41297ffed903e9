"""State dicts: tensors only, the structure among them, and never another structure's weights."""

from __future__ import annotations

import copy
import struct
import zlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dendrite_kernels as dk
from dendrite_kernels import Connectivity
from dendrite_kernels.packing import difference, pack, unpack
from tests import oracle
from tests.nn.test_nn import LAYERS, Make, assert_same, network, through_file, uneven


@LAYERS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_state_round_trip(make: Make, bias: bool, strict: bool) -> None:
    a, b = make(network(), bias=bias), make(network(), bias=bias)
    state = a.state_dict()
    assert state.keys() == {*dict(a.named_parameters()), "_extra_state"}
    result = b.load_state_dict(state, strict=strict)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same(a, b)


@LAYERS
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_state_round_trip_through_a_file(backend: str, make: Make, used: bool) -> None:
    """Also after the layer has worked: what backends attach to it must not reach the file."""
    a, b, x = make(network()), make(network()), torch.randn(3, 30)
    if used:
        a(x).sum().backward()
    state = through_file(a.state_dict(), weights_only=True)
    assert all(type(value) is Tensor for value in state.values())
    b.load_state_dict(state)
    assert_same(a, b)
    assert oracle.same(a(x), b(x), backend)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_state_of_a_model_through_a_file(backend: str, used: bool) -> None:
    a, b = (dk.models.build("dANN-LRF", (6, 6), 9, 2, 4, 3, layers=2, seed=0) for _ in range(2))
    if used:
        a(torch.randn(2, 36)).sum().backward()
    b.load_state_dict(through_file(a.state_dict(), weights_only=True))
    assert_same(a, b)


def test_a_state_on_meta_is_refused_by_name() -> None:
    layer = dk.SparseLinear(network())
    state = {name: tensor.to("meta") for name, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="Connectivity with values, got one on the meta device"):
        layer.load_state_dict(state)


@LAYERS
@pytest.mark.parametrize("strict", [True, False])
def test_weights_without_their_connectivity_are_refused(make: Make, strict: bool) -> None:
    """Sizes may be equal: nothing else tells whose weights they are."""
    layer, other = make(network()), make(network())
    before = copy.deepcopy(other)
    state = layer.state_dict()
    del state["_extra_state"]
    with pytest.raises(RuntimeError, match=r"Missing key '_extra_state'.*say so by") as caught:
        other.load_state_dict(state, strict=strict)
    assert_same(other, before)
    assert "state['_extra_state'] = layer.get_extra_state()" in str(caught.value)
    state["_extra_state"] = other.get_extra_state()
    other.load_state_dict(state, strict=strict)
    assert_same(other, layer)


@LAYERS
def test_a_state_of_other_modules_is_no_mismatch(make: Make) -> None:
    """strict=False may leave a layer out."""
    result = make(network()).load_state_dict({}, strict=False)
    assert "_extra_state" not in result.unexpected_keys
    assert {"_extra_state"} < set(result.missing_keys)


@LAYERS
def test_unexpected_keys_are_named(make: Make) -> None:
    without = make(network(), bias=False)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        without.load_state_dict(make(network()).state_dict())


@LAYERS
@pytest.mark.parametrize(
    "other",
    [
        network(seed=1),
        dk.connectivity.random(30, 10, 4, 7, seed=0),
        dk.connectivity.random(30, 20, 2, 6, seed=0),
        dk.connectivity.random(31, 10, 4, 6, seed=0),
    ],
    ids=["same sizes", "more synapses", "other somas", "more inputs"],
)
@pytest.mark.parametrize("strict", [True, False])
def test_state_of_another_connectivity_is_refused(
    make: Make, other: Connectivity, strict: bool
) -> None:
    layer = make(network())
    before = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match=r"Expected a state of .*from_state_dict") as caught:
        layer.load_state_dict(make(other).state_dict(), strict=strict)
    assert repr(layer.connectivity) in str(caught.value)
    assert_same(layer, before)  # not half loaded
    assert layer.connectivity == before.connectivity


def test_state_goes_to_another_dtype() -> None:
    a, b = dk.DendriticLayer(network()), dk.DendriticLayer(network(), dtype=torch.float64)
    b.load_state_dict(a.state_dict())
    assert_same(a.double(), b)


@LAYERS
def test_states_of_version_0_1_still_load(make: Make) -> None:
    """Their extra state is a dict of tensors."""
    a, b = make(network()), make(network())
    names = "crow_indices", "col_indices", "soma_ptr"
    old = {name: getattr(a.connectivity, name).clone() for name in names}
    state = {**a.state_dict(), "_extra_state": {**old, "in_features": torch.tensor(30)}}
    b.load_state_dict(through_file(state, weights_only=True))
    assert_same(a, b)
    with pytest.raises(RuntimeError, match="Expected a state of"):
        make(network(seed=1)).load_state_dict(state)
    assert make.from_state_dict(state).connectivity == a.connectivity


def test_functional_call_loads_nothing() -> None:
    """It runs a state's weights on the module's own connectivity, whatever the state's is."""
    layer, other = (dk.SparseLinear(network(seed=seed)) for seed in range(2))
    x, state = torch.randn(3, 30), other.state_dict()
    expected = dk.functional.sparse_linear(x, other.weight, other.bias, layer.connectivity)
    assert torch.equal(torch.func.functional_call(layer, state, x), expected)


@LAYERS
@pytest.mark.parametrize("prefix", ["", "0."])
def test_a_layer_from_a_state(make: Make, prefix: str) -> None:
    layer = make(network(), bias=False, dtype=torch.float64)
    state = (nn.Sequential(layer) if prefix else layer).state_dict()
    before = torch.get_rng_state()
    twin = make.from_state_dict(state, prefix, negative_slope=0.3, precision="bf16")
    assert torch.equal(torch.get_rng_state(), before)
    assert twin.connectivity == layer.connectivity
    assert (twin.negative_slope, twin.precision) == (0.3, "bf16")
    assert_same(twin, layer)
    nn.init.zeros_(next(iter(twin.parameters())))  # its own memory
    assert not torch.equal(next(iter(twin.parameters())), next(iter(layer.parameters())))


@LAYERS
def test_no_layer_from_another_state(make: Make) -> None:
    with pytest.raises(
        ValueError, match=r"Expected a state with .*_extra_state.* got keys \['x'\]"
    ):
        make.from_state_dict({"x": torch.zeros(2)})
    state = make(network()).state_dict()
    state[make.WEIGHT] = state[make.WEIGHT][:-1]
    with pytest.raises(ValueError, match="Expected a Connectivity of 239 synapses, got 240"):
        make.from_state_dict(state)
    state = make(network()).state_dict()
    state[make.BIAS] = state[make.BIAS][:-1]
    with pytest.raises(ValueError, match="size mismatch"):
        make.from_state_dict(state)


# The packed connectivity

PACKED = {
    "random": network,
    "uneven": uneven,
    "constant": lambda: dk.connectivity.random(30, 10, 4, 6, constant_fan_in=True, seed=0),
    "wide": lambda: dk.connectivity.random(70000, 3, 2, 5, seed=0),
    "dense": lambda: dk.connectivity.all_to_all(7, 3, 2),
    "image": lambda: dk.connectivity.local_receptive_fields((5, 4), 3, 2, 6, seed=0),
    "channels last": lambda: dk.connectivity.global_receptive_fields(
        (5, 4), 3, 2, 6, channels=3, seed=0
    ),
    "channels first": lambda: dk.connectivity.local_receptive_fields(
        (5, 4), 3, 2, 6, channels=3, channels_first=True, seed=0
    ),
    "no synapse": lambda: Connectivity.from_csr([0, 0, 0], [], 4, soma_ptr=[0, 0, 2]),
}


@pytest.mark.parametrize("name", PACKED)
def test_packing(name: str) -> None:
    c = PACKED[name]()
    packed = pack(c)
    assert (packed.dtype, packed.dim()) == (torch.uint8, 1)
    back = unpack(packed, c.nnz)
    assert back == c
    assert (back.in_shape, back.channels_first) == (c.in_shape, c.channels_first)


def test_what_sizes_tell_is_not_stored() -> None:
    c = PACKED["constant"]()
    assert pack(c).numel() == 14 * 8 + 2 * c.nnz
    assert pack(PACKED["dense"]()).numel() == 14 * 8
    assert pack(PACKED["wide"]()).numel() == 14 * 8 + 4 * (6 + 1 + 30)  # columns and crow


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64])
def test_averages_of_one_packing_are_that_packing(dtype: torch.dtype) -> None:
    c = network()
    packed = pack(c)
    assert unpack(packed.to(dtype), c.nnz) == c
    if dtype.is_floating_point:
        assert unpack(packed.to(dtype) + 0.05, c.nnz) == c
        for much in (0.2, 0.5):
            with pytest.raises(ValueError, match="got no bytes: it is damaged, or an average"):
                unpack(packed.to(dtype) + much, c.nnz)


HEADER = 14


def damaged(c: Connectivity, field: int, value: int) -> Tensor:
    """With the right checksum, unless that is the field."""
    packed = pack(c)
    packed[8 * field : 8 * field + 8] = torch.tensor(list(struct.pack("<q", value)))
    return packed if field == 2 else sealed(packed)


def sealed(packed: Tensor) -> Tensor:
    checksum = struct.pack("<q", zlib.crc32(packed[24:].numpy().tobytes()))
    return torch.cat([packed[:16], torch.tensor(list(checksum), dtype=torch.uint8), packed[24:]])


@pytest.mark.parametrize("name", ["random", "constant", "image", "dense"])
def test_damaged_headers(name: str) -> None:
    """Refused, or what it says fits the rest: never a crash or memory for what is not there."""
    c = PACKED[name]()
    refused = 0
    for field in range(HEADER):
        for value in (-1, 0, 2, 2**31, 2**40, 2**62, -(2**63)):
            try:
                back = unpack(damaged(c, field, value), c.nnz)
            except ValueError:
                refused += 1
            else:
                assert back.nnz == c.nnz
    assert refused > 6 * 8  # the first eight sizes have one right value each


def test_damaged_bytes() -> None:
    c = network()
    packed = pack(c)
    for wrong in (packed[:-1], torch.cat([packed, packed[:1]]), packed[: 8 * 13], packed[:5]):
        with pytest.raises(ValueError, match=r"Expected .*Connectivity"):
            unpack(wrong, c.nnz)
    for wrong in (packed[None], None, {}, torch.zeros(3, device="meta")):
        with pytest.raises(TypeError, match="Expected a packed Connectivity"):
            unpack(wrong, c.nnz)
    packed[-1] = 200
    with pytest.raises(ValueError, match=r"Expected columns in \[0, 30\)"):
        unpack(sealed(packed), c.nnz)


def test_every_changed_byte_is_seen() -> None:
    """Also where another valid connectivity comes out, of the same sizes."""
    c = dk.connectivity.random(784, 3, 2, 4, seed=0)
    packed = pack(c)
    for i in range(packed.numel()):
        wrong = packed.clone()
        wrong[i] ^= 1 << i % 8
        with pytest.raises(ValueError, match="Expected a"):
            unpack(wrong, c.nnz)


WRONG_AVERAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "sum of 2, divided": lambda v: sum([v, v]) / 2,
    "sum of 3, divided": lambda v: sum([v, v, v]) / 3,
    "sum of 2, integers": lambda v: (v + v) // 2,
    "moving, bfloat16": lambda v: moving_average(v.bfloat16()),
}


def moving_average(v: Tensor) -> Tensor:
    mean = v.clone()
    for _ in range(5):
        mean = mean * 0.9 + v * 0.1
    return mean


@pytest.mark.parametrize("average", WRONG_AVERAGES.values(), ids=WRONG_AVERAGES)
def test_averages_that_change_bytes_are_refused(average: Callable[[Tensor], Tensor]) -> None:
    """Or right: some of them are other valid connectivities, whose columns rise too."""
    refused = 0
    for seed in range(20):
        layer = dk.SparseLinear(dk.connectivity.random(784, 8, 2, 3, seed=seed))
        state = {k: average(v) for k, v in layer.state_dict().items()}
        try:
            made = dk.SparseLinear.from_state_dict(state)
        except ValueError as error:
            refused += "uint8 wrap. Average only entries that are floating" in str(error)
        else:
            assert made.connectivity == layer.connectivity
    assert refused


@pytest.mark.parametrize(
    ("crow", "col", "soma", "in_features", "text"),
    [
        ([0, 2, 3], [0, 1, 3], [0, 0, 2, 2], 5, "Expected in_features=4, got 5"),
        ([0, 3], [0, 1, 3], [0, 1], 4, "Expected num_dendrites=2, got 1"),
        ([0, 2, 3], [0, 1, 3], [0, 2], 4, "Expected num_somas=3, got 1"),
        ([0, 2, 4], [0, 1, 2, 3], [0, 0, 2, 2], 4, "Expected nnz=3, got 4"),
        (
            [0, 2, 3], [0, 1, 3], [0, 1, 2, 2], 4,
            "Expected soma 0 to own dendrites 0:0, got 0:1",
        ),
        ([0, 1, 3], [0, 1, 3], [0, 0, 2, 2], 4, "Expected dendrite 0 on inputs [0, 1], got [0]"),
        ([0, 2, 3], [0, 1, 2], [0, 0, 2, 2], 4, "Expected dendrite 1 on inputs [3], got [2]"),
        ([0, 2, 3], [0, 1, 3], [0, 0, 2, 2], 4, "Expected another connectivity, got an equal one"),
    ],
)  # fmt: skip
def test_difference(
    crow: list[int], col: list[int], soma: list[int], in_features: int, text: str
) -> None:
    a = Connectivity([0, 2, 3], [0, 1, 3], [0, 0, 2, 2], 4)
    assert difference(a, Connectivity(crow, col, soma, in_features)) == text
