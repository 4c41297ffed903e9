"""Trees of any depth, beside the same tree as dense matrices in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dendrite_kernels as dk
from dendrite_kernels import Connectivity, DendriticTree
from dendrite_kernels.operators import known_connectivity
from tests import oracle
from tests.networks import ragged
from tests.nn.test_nn import assert_same, through_file

N, S = 30, 6


def flat() -> Connectivity:
    """6 somas of 12 dendrites, which see 7 of 30 inputs."""
    return dk.connectivity.random(N, S, 12, 7, constant_fan_in=True, seed=0)


def onto(nodes: int, synapses: int, seed: int) -> Connectivity:
    return dk.connectivity.random(N, nodes, 1, synapses, seed=seed)


def uneven(**options: Any) -> DendriticTree:
    """Branches of 0 to 10 children, somas of 0 to 3 branches."""
    c = ragged(N, 20, [0, 13, 13, 20], seed=1)
    return DendriticTree(c, [[0, 3, 3, 13, 14, 20], torch.tensor([0, 3, 3, 5])], **options)


def everywhere(**options: Any) -> DendriticTree:
    """Synapses on every level."""
    synapses = [onto(24, 4, 1), onto(12, 3, 2), onto(S, 5, 3)]
    return DendriticTree(flat(), [3, 2, 2], level_synapses=synapses, **options)


Make = Callable[..., DendriticTree]
TREES: dict[str, Make] = {
    "one level": lambda **o: DendriticTree(flat(), [12], **o),
    "two levels": lambda **o: DendriticTree(flat(), [4, 3], **o),
    "deep": lambda **o: DendriticTree(
        dk.connectivity.random(N, 2, 64, 2, constant_fan_in=True, seed=0), [2] * 6, **o
    ),
    "ragged": uneven,
    "mixed": lambda **o: DendriticTree(
        flat(), [4, list(range(0, 19, 3))], level_synapses=[None, onto(S, 5, 3)], **o
    ),
    "synapses everywhere": everywhere,
    "dense": lambda **o: DendriticTree(dk.connectivity.all_to_all(N, 1, 4), [2, 2], **o),
}
EVERY = pytest.mark.parametrize("make", TREES.values(), ids=TREES)
_SOME = ["one level", "ragged", "synapses everywhere"]
SOME = pytest.mark.parametrize("make", [TREES[name] for name in _SOME], ids=_SOME)


def matrix(c: Connectivity, weight: Tensor) -> Tensor:
    """The weights as [R, N], zeros elsewhere."""
    return torch.zeros(c.num_dendrites, c.in_features, dtype=weight.dtype).masked_scatter(
        c.to_mask(), weight
    )


def dense(
    tree: DendriticTree, x: Tensor, named: dict[str, Tensor], phi: Any = None, psi: Any = None
) -> Tensor:
    """The tree of plain matrices: in float64 if the values are."""
    phi = phi or (lambda v: F.leaky_relu(v, 0.1))
    psi = psi or phi

    def bias(level: int) -> Tensor:
        return named.get(f"bias.{level}", torch.zeros((), dtype=x.dtype))

    a = phi(x @ matrix(tree.connectivity, named["synapse_weight"]).T + bias(0))
    for level, pointer in enumerate((part.crow_indices for part in tree.chains), 1):
        owner = torch.repeat_interleave(pointer.long().diff())
        joins = F.one_hot(owner, len(pointer) - 1).to(x.dtype).T  # [nodes, children]
        weights = [joins * named[f"cable.{level - 1}"], torch.zeros(len(joins), N, dtype=x.dtype)]
        synapses = tree.level_synapses[level - 1]
        if synapses is not None:
            weights[1] = matrix(synapses, named[f"level_weight.{level}"])
        v = torch.cat([a, x], -1) @ torch.cat(weights, -1).T + bias(level)
        a = psi(v) if level == len(tree.chains) else phi(v)
    return a


def drawn(make: Make, **options: Any) -> DendriticTree:
    """A tree whose biases are not 0."""
    tree = make(**options)
    for bias in tree.bias or ():
        nn.init.uniform_(bias, -1, 1)
    return tree


def gradients(function: Any, x: Tensor, named: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: v.detach().clone().requires_grad_() for name, v in [("x", x), *named.items()]}
    y = function(leaves["x"], {name: leaves[name] for name in named})
    grad = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    found = torch.autograd.grad(y, list(leaves.values()), grad)
    return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}


@EVERY
@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, False), (torch.float64, True)])
def test_equals_dense_matrices(backend: str, make: Make, dtype: torch.dtype, bias: bool) -> None:
    tree, x = drawn(make, dtype=dtype, bias=bias), torch.randn(33, N, dtype=dtype)
    named = dict(tree.named_parameters())
    ours = gradients(lambda x, p: torch.func.functional_call(tree, p, x), x, named)
    wide = {name: value.double() for name, value in named.items()}
    exact = gradients(lambda x, p: dense(tree, x, p), x.double(), wide)
    for name, expected in exact.items():
        bound = 1e-5 if dtype == torch.float32 else 1e-13
        assert oracle.relative_error(ours[name], expected) < bound, name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"activation": "relu", "dtype": torch.float64},
        {"activation": "tanh"},
        {"soma_activation": "identity", "negative_slope": 0.3},
        {"precision": "bf16"},
        {"init": "paper"},
    ],
    ids=str,
)
def test_one_level_is_a_dendritic_layer_bit_for_bit(backend: str, options: Any) -> None:
    c = dk.connectivity.local_receptive_fields((8, 6), 10, 4, 9, seed=0)
    torch.manual_seed(1)
    layer = dk.DendriticLayer(c, **options)
    torch.manual_seed(1)
    tree = DendriticTree(c, [4], **options)
    x = torch.randn(40, 8, 6, dtype=layer.synapse_weight.dtype)
    found = []
    for module in (layer, tree):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.square().sum().backward()
        named = dict(module.named_parameters())
        assert all(p.grad is not None for p in named.values())
        found.append([y, leaf.grad, {name: (p, p.grad) for name, p in named.items()}])
    (y, dx, ours), (tree_y, tree_dx, theirs) = found
    assert oracle.same(tree_y, y, backend)
    assert oracle.same(tree_dx, dx, backend)
    names = {"dendrite_bias": "bias.0", "cable_weight": "cable.0", "soma_bias": "bias.1"}
    assert {names.get(name, name) for name in ours} == set(theirs)
    for name, (value, grad) in ours.items():
        tree_value, tree_grad = theirs[names.get(name, name)]
        assert torch.equal(tree_value, value), name
        assert oracle.same(tree_grad, grad, backend), name


@SOME
def test_derivatives(make: Make) -> None:
    tree = drawn(make, dtype=torch.float64, activation="tanh")
    values = [p.detach().requires_grad_() for p in tree.parameters()]
    names = [name for name, _ in tree.named_parameters()]
    x = torch.randn(2, N, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(tree, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, *values), fast_mode=True)


def test_activations() -> None:
    tree = drawn(everywhere, activation="tanh", soma_activation="sigmoid", dtype=torch.float64)
    x = torch.randn(5, N, dtype=torch.float64)
    expected = dense(tree, x, dict(tree.named_parameters()), torch.tanh, torch.sigmoid)
    torch.testing.assert_close(tree(x), expected)


def test_a_fresh_tree_keeps_the_scale_of_its_node_fan_ins() -> None:
    """Uniform within sqrt(6 / (1.01 fan_in)); children and synapses count together."""
    c = dk.connectivity.random(N, 40, 12, 7, constant_fan_in=True, seed=0)
    drawn = dk.connectivity.random(N, 160, 1, 4, constant_fan_in=True, seed=1)
    tree = DendriticTree(c, [3, 4], level_synapses=[drawn, None])
    fan_ins = {"synapse_weight": 7, "cable.0": 3 + 4, "level_weight.1": 3 + 4, "cable.1": 4}
    for name, fan_in in fan_ins.items():
        largest = tree.get_parameter(name).abs().max().item() / (6 / 1.01 / fan_in) ** 0.5
        assert 0.95 < largest <= 1, name
    assert not any(bias.any() for bias in tree.bias or ())


@EVERY
def test_shapes(make: Make) -> None:
    tree = make()
    assert tree(torch.randn(0, N)).shape == (0, tree.connectivity.num_somas)
    x = torch.randn(2, 3, N)
    assert oracle.relative_error(tree(x).flatten(0, 1), tree(x.flatten(0, 1))) < 1e-6
    assert oracle.relative_error(tree(x[0, 0]), tree(x)[0, 0]) < 1e-6
    with pytest.raises(ValueError, match=r"Expected x of shape \[..., 30\], got \[2, 29\]"):
        tree(torch.randn(2, 29))


def test_images(tmp_path: Path) -> None:
    c = dk.connectivity.local_receptive_fields(
        (4, 5), 3, 4, 5, channels=3, channels_first=True, seed=0
    )
    synapses = dk.connectivity.random(60, 6, 1, 4, seed=1)
    tree = DendriticTree(c, [2, 2], level_synapses=[synapses, None])
    x = torch.randn(7, 3, 4, 5)
    assert torch.equal(tree(x), tree(x.flatten(1)))
    assert oracle.relative_error(dk.interop.portable(tree)(x), tree(x)) < 1e-6
    back = DendriticTree.from_state_dict(tree.state_dict())
    assert torch.equal(back(x), tree(x))
    dk.save(tree, tmp_path / "tree")
    assert torch.equal(dk.load(tmp_path / "tree")(x), tree(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    tree, x = drawn(everywhere), torch.randn(9, N)
    expected = tree(x)
    with oracle.autocast(dtype):
        mixed = tree(x)
    low = copy.deepcopy(tree).to(dtype)(x.to(dtype))
    low.sum().backward()
    for y in (mixed, low):
        assert y.dtype == dtype
        assert oracle.relative_error(y, expected) < 0.02
    rounded = everywhere(precision="bf16")
    rounded.load_state_dict(tree.state_dict())
    assert torch.equal(rounded(x), tree(x.bfloat16().float()))


def test_fake_tensors() -> None:
    with FakeTensorMode():
        tree = everywhere()
        assert tree(torch.randn(4, N)).shape == (4, S)


def test_meta_device() -> None:
    tree = everywhere(device="meta")
    assert all(p.is_meta for p in tree.parameters())
    real = tree.to_empty(device="cpu")
    real.reset_parameters()
    assert all(torch.isfinite(p).all() for p in real.parameters())
    real(torch.randn(2, N))


@SOME
def test_compiled(make: Make) -> None:
    tree, x = drawn(make), torch.randn(8, N)
    torch._dynamo.reset()
    compiled = torch.compile(tree, backend="aot_eager", fullgraph=True)
    y, expected = compiled(x), tree(x)
    assert oracle.relative_error(y, expected) < 1e-6
    ours = torch.autograd.grad(y.square().sum(), list(tree.parameters()))
    theirs = torch.autograd.grad(expected.square().sum(), list(tree.parameters()))
    assert max(oracle.errors(ours, theirs)) < 1e-5


def test_exported() -> None:
    tree, batch = drawn(everywhere), torch.export.Dim("batch")
    program = torch.export.export(tree, (torch.randn(8, N),), dynamic_shapes=({0: batch},))
    x = torch.randn(33, N)
    assert oracle.relative_error(program.module()(x), tree(x)) < 1e-6


@SOME
def test_portable(make: Make) -> None:
    tree, x = drawn(make, soma_activation="tanh"), torch.randn(8, N)
    plain = dk.interop.portable(nn.Sequential(tree))
    for program in (plain, torch.jit.script(plain), torch.jit.trace(plain, x)):
        assert oracle.relative_error(program(x), tree(x)) < 1e-6


def test_per_sample_gradients() -> None:
    tree, x = drawn(everywhere), torch.randn(4, N)
    named = dict(tree.named_parameters())

    def loss(named: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(tree, named, x).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(named, x)
    whole = torch.func.grad(loss)(named, x)
    for name, value in whole.items():
        torch.testing.assert_close(found[name].sum(0), value, rtol=1e-4, atol=1e-5)


# ---- its state ----


@SOME
@pytest.mark.parametrize("bias", [True, False])
def test_state(make: Make, bias: bool) -> None:
    tree, other, x = drawn(make, bias=bias), make(bias=bias), torch.randn(3, N)
    tree(x).sum().backward()
    state = through_file(tree.state_dict(), weights_only=True)
    assert state.keys() == {*dict(tree.named_parameters()), "_extra_state"}
    other.load_state_dict(state)
    assert_same(other, tree)
    prefixed = {f"0.{name}": value for name, value in state.items()}
    made = DendriticTree.from_state_dict(prefixed, "0.")
    assert_same(made, tree)
    assert repr(made) == repr(tree)
    assert torch.equal(made(x), tree(x))


@pytest.mark.parametrize(
    "other",
    [
        lambda: DendriticTree(flat(), [3, 4]),
        lambda: DendriticTree(flat(), [12]),
        lambda: DendriticTree(flat(), [[*range(0, 68, 4), 67, 72], 3]),
        lambda: DendriticTree(flat(), [4, 3], level_synapses=[None, onto(S, 5, 3)]),
        lambda: DendriticTree(dk.connectivity.random(N, S, 12, 7, seed=1), [4, 3]),
    ],
    ids=["branching", "depth", "ragged", "synapses", "connectivity"],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_of_another_tree_is_refused(
    other: Callable[[], DendriticTree], strict: bool
) -> None:
    tree = drawn(TREES["two levels"])
    before = copy.deepcopy(tree)
    with pytest.raises(RuntimeError, match=r"Expected a state of this tree .*from_state_dict"):
        tree.load_state_dict(other().state_dict(), strict=strict)
    assert_same(tree, before)


def test_a_state_without_structure_is_refused() -> None:
    state = dict(everywhere().state_dict())
    del state["_extra_state"]
    with pytest.raises(RuntimeError, match="Missing key '_extra_state'"):
        everywhere().load_state_dict(state)
    with pytest.raises(ValueError, match="Expected a state with"):
        DendriticTree.from_state_dict(state)
    with pytest.raises(ValueError, match="Expected a state with"):
        DendriticTree.from_state_dict(dk.DendriticLayer(flat()).state_dict())


@SOME
def test_copies_and_files(make: Make, tmp_path: Path) -> None:
    tree, x = drawn(make, activation="relu", soma_activation="tanh"), torch.randn(3, N)
    tree.cable[0].requires_grad_(False)
    dk.save(nn.Sequential(tree, nn.Linear(tree.connectivity.num_somas, 2)), tmp_path / "model")
    back: Any = dk.load(tmp_path / "model")
    assert not back[0].cable[0].requires_grad
    for other in (copy.deepcopy(tree), pickle.loads(pickle.dumps(tree)), back[0]):
        assert type(other) is DendriticTree
        assert_same(other, tree)
        assert repr(other) == repr(tree)
        for part in (other.twigs, *other._parts()):  # compiled code finds plans by these
            indices = part.crow_indices, part.col_indices, part.soma_ptr
            assert known_connectivity(*indices) is part
        assert torch.equal(other(x), tree(x))
    torch._dynamo.reset()
    compiled = torch.compile(pickle.loads(pickle.dumps(tree)), backend="eager", fullgraph=True)
    assert oracle.relative_error(compiled(x), tree(x)) < 1e-6


def test_pruning() -> None:
    tree = drawn(everywhere)
    pruned = tree.prune(0.5)
    assert pruned.connectivity.nnz < tree.connectivity.nnz
    kept = matrix(pruned.connectivity, pruned.synapse_weight) != 0
    whole = matrix(tree.connectivity, tree.synapse_weight)
    named = {**dict(tree.named_parameters()), "synapse_weight": (whole * kept)[flat().to_mask()]}
    x = torch.randn(4, N)
    torch.testing.assert_close(pruned(x), torch.func.functional_call(tree, named, x))


def test_groups_of_parameters() -> None:
    tree = everywhere()
    decay, rest = dk.optim.parameter_groups(tree, 0.1)
    assert {id(p) for p in rest["params"]} == {id(p) for p in tree.bias or ()}
    assert len(decay["params"]) == 1 + 3 + 3


def test_counts_of_parameters() -> None:
    tree = everywhere()
    weights = flat().nnz + 72 + 24 + 12 + sum(p.nnz for p in tree.level_synapses if p)
    assert dk.models.count_parameters(tree) == weights + 72 + 24 + 12 + S
    matrices = 72 * (N + 1) + 24 * (72 + N + 1) + 12 * (24 + N + 1) + S * (12 + N + 1)
    assert dk.models.count_dense_parameters(tree) == matrices
    one, layer = DendriticTree(flat(), [12]), dk.DendriticLayer(flat())
    assert dk.models.count_dense_parameters(one) == dk.models.count_dense_parameters(layer)


def test_training() -> None:
    torch.manual_seed(0)
    tree, x = everywhere(), torch.randn(64, N)
    target = x[:, :S].abs()
    optimizer = torch.optim.Adam(tree.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(tree(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---- what it refuses ----


@pytest.mark.parametrize(
    ("branching", "message"),
    [
        ([], "Expected branching of at least one level, got none"),
        (4, "Expected branching to be a list with an entry a level, got 4"),
        ([4, 4], "product 12, the dendrites of a soma, got [4, 4] with product 16"),
        ([12, 0], "Expected branching[1] from 1 to 2**31 - 1, got 0"),
        ([True, 12], "Expected branching[0] to be an integer, got True"),
        ([2.5, 4], "Expected branching[0] to be an integer, got 2.5"),
        ([[0, 40, 30, 72], 3], "Expected branching[0] not to decrease, got 40 then 30 at node 1"),
        ([12, [0, 5]], "Expected branching[1] to end at the nodes below, 6, got 5"),
        ([12, [1, 6]], "Expected branching[1] to start at 0, got 1"),
        ([5, [0, 6]], "Expected branching[0] to divide 72 nodes below, got 5"),
        ([[0, 10, 72]], "Expected branching that leads to the 6 somas of the connectivity"),
    ],
)
def test_branching_is_checked(branching: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        DendriticTree(flat(), branching)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("synapses", "message"),
    [
        ([None], "Expected level_synapses with 2 entries, one a level of branching, got 1"),
        (onto(S, 5, 3), "one a level of branching, got Connectivity"),
        ([None, 5], "Expected level_synapses[1] to be a Connectivity or None, got int"),
        (
            [onto(S, 5, 3), None],
            "Expected level_synapses[0] of 30 inputs and 18 dendrites, one a node, got 30 and 6",
        ),
        ([None, dk.connectivity.random(31, S, 1, 5, seed=0)], "got 31 and 6"),
    ],
)
def test_level_synapses_are_checked(synapses: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        DendriticTree(flat(), [4, 3], level_synapses=synapses)
    assert message in str(caught.value)


def test_other_options_are_checked() -> None:
    for options, message in [
        ({"activation": "rellu"}, "got 'rellu'"),
        ({"soma_activation": "rellu"}, "got 'rellu'"),
        ({"negative_slope": -1.0}, "negative_slope"),
        ({"init": "none"}, "Expected init"),
        ({"precision": "bf61"}, "Expected precision"),
        ({"dtype": torch.int32}, "of dtype"),
    ]:
        arguments: Any = options
        with pytest.raises((TypeError, ValueError), match=message):
            DendriticTree(flat(), [4, 3], **arguments)
    with pytest.raises(TypeError, match="Expected a Connectivity, got int"):
        DendriticTree(3, [4, 3])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Expected a DendriticLayer, got DendriticTree"):
        dk.parallel.ShardSomas()._apply(everywhere(), None)  # type: ignore[arg-type]
