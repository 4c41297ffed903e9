"""Dendritic trees of any depth: twigs join in branches, and branches in somas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from . import activations, functional, operators
from ._validate import Array, check_size, pointer_array
from .activations import ActivationName
from .connectivity import chain
from .nn import Init, _init_rows, _Sparse, _uniform, check_numbers, glorot_bound
from .packing import difference, pack_all, unpack_all
from .structure import Connectivity

if TYPE_CHECKING:
    from typing_extensions import Self

Branching = Sequence[SupportsIndex | Sequence[int] | Array | torch.Tensor]


class DendriticTree(_Sparse):
    """A layer of neurons whose dendrites form trees: a DendriticLayer has one level, this has L.

        a_0 = phi(W x + b_0)
        v_l[p] = sum_{j in children of p} c_{l-1}[j] a_{l-1}[j] + W_l[p] x + b_l[p],   l = 1 .. L
        a_l = phi(v_l), but y = psi(v_L)

    Level 0 are the dendrites of the connectivity, level L its somas; children of a node are
    consecutive. W_l x is there where level l has synapses of its own.

    Parameters:
        synapse_weight [nnz]; cable.l [nodes of level l], l = 0 .. L - 1; bias.l [nodes of level l],
        l = 0 .. L; level_weight.l [nnz of level_synapses[l - 1]] of the levels that have synapses.

    Args:
        connectivity: N inputs, R dendrites, S somas.
        branching: from the dendrites up, for each level how many children a node has, or, where
            that varies, a pointer [nodes + 1] such as soma_ptr: node p has the children
            pointer[p]:pointer[p + 1] of the level below. All levels together must lead to the somas
            of the connectivity: [4, 4] to those of 16 dendrites.
        level_synapses: for each level of `branching` a Connectivity of the N inputs and one
            dendrite for each node (its somas play no part), or None.
        bias: whether nodes have one, on all levels.
        activation, negative_slope: phi, of all nodes, see functional.dendritic_layer.
        soma_activation: psi, of somas, None: as the other nodes.
        init, precision, device, dtype: as in DendriticLayer. The fan-in of a node is the number of
            its children and synapses.

    Shape: [..., N] -> [..., S]; images as for DendriticLayer.

    Raises:
        TypeError, ValueError: an argument or an input does not fit.

    Source: docs/trees.md.
    """

    WEIGHT = "synapse_weight"
    OPTIONS = "activation", "negative_slope", "soma_activation", "init", "precision"

    def __init__(
        self,
        connectivity: Connectivity,
        branching: Branching,
        *,
        level_synapses: Sequence[Connectivity | None] | None = None,
        bias: bool = True,
        activation: ActivationName = "leaky_relu",
        negative_slope: float = 0.1,
        soma_activation: ActivationName | None = None,
        init: Init = "fan_in",
        precision: functional.Precision | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(connectivity, init)
        activations.slopes_of(activation, soma_activation, negative_slope)
        functional.check_dtype("parameters", dtype or torch.get_default_dtype())
        functional.check_precision(precision)
        c = connectivity
        with unset_fake_temporarily():  # FakeTensorMode takes no index tensor apart
            self.chains = tuple(map(chain, _pointers(branching, c)))
            self.twigs = c if len(self.chains) == 1 else _on_branches(c, self.chains[0])
        self.level_synapses = _checked(level_synapses, self.chains, c)
        self.activation, self.soma_activation = activation, soma_activation
        self.negative_slope = float(negative_slope)
        self.precision = precision

        def parameter(size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype))

        nodes = [c.num_dendrites, *(level.num_dendrites for level in self.chains)]
        self.synapse_weight = parameter(c.nnz)
        self.cable = nn.ParameterList(map(parameter, nodes[:-1]))
        self.bias = nn.ParameterList(map(parameter, nodes)) if bias else None
        self.level_weight = nn.ParameterDict(
            {
                str(level): parameter(synapses.nnz)
                for level, synapses in enumerate(self.level_synapses, 1)
                if synapses is not None
            }
        )
        self.PARAMETERS = tuple(name for name, _ in self.named_parameters())
        self._mark()
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()

    def _parts(self) -> list[Connectivity]:
        """What a state holds: synapses of dendrites, children, synapses of other levels."""
        return [self.connectivity, *self.chains, *filter(None, self.level_synapses)]

    def _mark(self) -> None:
        for part in (self.twigs, *self._parts()):
            operators.index_tensors(part)  # compiled code cannot mark them

    def activation_of(self, level: int) -> ActivationName:
        """The name of the activation that the nodes of a level have."""
        if level == len(self.chains):
            return self.soma_activation or self.activation
        return self.activation

    def reset_parameters(self) -> None:
        """Draw all parameters anew from torch's generator."""
        slope = activations.slope_of(self.activation, self.negative_slope) or 0.0
        c = self.connectivity
        if self.init == "paper":
            _uniform(self.synapse_weight, glorot_bound(c.in_features, c.num_dendrites))
        else:
            _init_rows(self.synapse_weight, c.crow_indices, slope)
        for level, (children, synapses) in enumerate(
            zip(self.chains, self.level_synapses, strict=True), 1
        ):
            drawn = [(self.cable[level - 1], children)]
            if synapses is not None:
                drawn.append((self.level_weight[str(level)], synapses))
            inputs = sum(part.in_features for _, part in drawn)
            pointers = [operators.beside(weight, part.crow_indices) for weight, part in drawn]
            fan_in = torch.stack(pointers).long().sum(0).diff()  # of each node
            for weight, part in drawn:
                if self.init == "paper":
                    _uniform(weight, glorot_bound(inputs, part.num_dendrites))
                else:
                    _init_rows(weight, part.crow_indices, slope, fan_in)
        for bias in self.bias or ():
            nn.init.zeros_(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., N] -> [..., S]."""
        if self.level_weight:
            x = functional._rows_of(x, self.connectivity)  # the other levels know no image
        none = [None] * (len(self.chains) + 1)
        biases = none if self.bias is None else list(self.bias)
        a = x
        for level, (children, synapses) in enumerate(
            zip(self.chains, self.level_synapses, strict=True), 1
        ):
            cable, bias = self.cable[level - 1], biases[level]
            phi = self.activation_of(level)
            if level == 1:
                a = functional.dendritic_layer(
                    x,
                    self.synapse_weight,
                    biases[0],
                    cable,
                    bias,
                    self.twigs,
                    activation=self.activation,
                    negative_slope=self.negative_slope,
                    soma_activation=phi if synapses is None else "identity",
                    precision=self.precision,
                )
                if synapses is None:
                    continue
            else:
                a = functional.sparse_linear(a, cable, bias, children)
            if synapses is not None:
                weight = self.level_weight[str(level)]
                a = a + functional.sparse_linear(
                    x, weight, None, synapses, precision=self.precision
                )
            a = activations.function_of(phi, self.negative_slope)(a)
        return a

    def set_extra_state(self, state: Any) -> None:
        """RuntimeError unless `state` is that of an equal tree."""
        expected = self._parts()
        try:
            saved = unpack_all(state, [part.nnz for part in expected])
            pairs = zip(expected, saved, strict=True)
            reason = next((difference(own, other) for own, other in pairs if own != other), None)
        except (TypeError, ValueError) as error:
            reason = str(error)
        if reason is not None:
            raise RuntimeError(
                f"Expected a state of this tree of {self.connectivity}, got another one. {reason}. "
                "DendriticTree.from_state_dict makes a tree of the state's structure"
            )

    def _packed(self, connectivity: Connectivity) -> torch.Tensor:
        return pack_all([connectivity, *self._parts()[1:]])

    @classmethod
    def _of_state(cls, state: Mapping[str, Any], prefix: str, options: Mapping[str, Any]) -> Self:
        """The tree that fits a state, its parameters on the meta device."""
        weights: list[Any] = [state.get(f"{prefix}synapse_weight")]
        while f"{prefix}cable.{len(weights) - 1}" in state:
            weights.append(state[f"{prefix}cable.{len(weights) - 1}"])
        depth = len(weights) - 1
        levels = [n for n in range(1, depth + 1) if f"{prefix}level_weight.{n}" in state]
        weights += [state[f"{prefix}level_weight.{n}"] for n in levels]
        packed = state.get(f"{prefix}_extra_state")
        if packed is None or not depth or not all(isinstance(w, torch.Tensor) for w in weights):
            names = [f"{prefix}{name}" for name in ("synapse_weight", "cable.0", "_extra_state")]
            raise ValueError(
                f"Expected a state with {names}, got keys {sorted(map(str, state))[:8]}"
            )
        for weight in weights:
            check_numbers(f"each weight of {prefix}", weight)
        try:
            c, *rest = unpack_all(packed, [weight.numel() for weight in weights])
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"Expected the state of a {cls.__name__}: {error}") from error
        synapses = dict(zip(levels, rest[depth:], strict=True))
        make: Any = cls
        tree: Self = make(
            c,
            [part.crow_indices for part in rest[:depth]],
            level_synapses=[synapses.get(level) for level in range(1, depth + 1)],
            bias=f"{prefix}bias.0" in state,
            device="meta",
            dtype=weights[0].dtype,
            **options,
        )
        return tree

    def extra_repr(self) -> str:
        children = [part.fan_in or "ragged" for part in self.chains]
        branching = ", ".join(map(str, children))
        synapses = [0 if part is None else part.nnz for part in self.level_synapses]
        levels = f", level_synapses={synapses}" if any(synapses) else ""
        slope = f"({self.negative_slope:g})" if self.activation == "leaky_relu" else ""
        soma = f", soma_activation={self.soma_activation}" if self.soma_activation else ""
        return (
            f"{self.connectivity}, branching=[{branching}]{levels}, bias={self.bias is not None}, "
            f"activation={self.activation}{slope}{soma}, init={self.init}{self._precision_repr()}"
        )


def _pointers(branching: Branching, c: Connectivity) -> list[Array]:
    """Which nodes below each node of a level owns, level by level."""
    if not isinstance(branching, Sequence) or isinstance(branching, str):
        raise TypeError(f"Expected branching to be a list with an entry a level, got {branching!r}")
    if not branching:
        raise ValueError("Expected branching of at least one level, got none")
    counts = [
        check_size(f"branching[{i}]", entry) if np.ndim(entry) == 0 else None  # type: ignore[arg-type]
        for i, entry in enumerate(branching)
    ]
    own = c.dendrites_per_soma
    product = None if None in counts else math.prod(filter(None, counts))
    if own is not None and product is not None and product != own:
        raise ValueError(
            f"Expected branching with product {own}, the dendrites of a soma, "
            f"got {counts} with product {product}"
        )
    pointers: list[Array] = []
    dendrites = np.arange(c.num_dendrites + 1)  # [nodes + 1], where those of each node begin
    for i, (entry, count) in enumerate(zip(branching, counts, strict=True)):
        nodes = dendrites.size - 1
        if count is None:
            pointer = pointer_array(f"branching[{i}]", entry, "node", nodes, "nodes below")
        elif nodes % count:
            raise ValueError(f"Expected branching[{i}] to divide {nodes} nodes below, got {count}")
        else:
            pointer = np.arange(0, nodes + 1, count)
        pointers.append(pointer)
        dendrites = dendrites[pointer]
    somas = c.soma_ptr.numpy()
    if not np.array_equal(dendrites, somas):
        raise ValueError(
            f"Expected branching that leads to the {c.num_somas} somas of the connectivity, whose "
            f"dendrites begin at {somas[:8].tolist()}, got {dendrites.size - 1} somas whose "
            f"dendrites begin at {dendrites[:8].tolist()}"
        )
    return pointers


def _checked(
    synapses: Sequence[Connectivity | None] | None,
    chains: Sequence[Connectivity],
    c: Connectivity,
) -> tuple[Connectivity | None, ...]:
    """The synapses of each level above the dendrites, None where there are none."""
    if synapses is None:
        return (None,) * len(chains)
    if not isinstance(synapses, Sequence) or len(synapses) != len(chains):
        got = len(synapses) if isinstance(synapses, Sequence) else type(synapses).__name__
        raise ValueError(
            f"Expected level_synapses with {len(chains)} entries, one a level of branching, "
            f"got {got}"
        )
    for i, (part, children) in enumerate(zip(synapses, chains, strict=True)):
        if part is None:
            continue
        if not isinstance(part, Connectivity):
            raise TypeError(
                f"Expected level_synapses[{i}] to be a Connectivity or None, "
                f"got {type(part).__name__}"
            )
        sizes = c.in_features, children.num_dendrites
        if (part.in_features, part.num_dendrites) != sizes:
            raise ValueError(
                f"Expected level_synapses[{i}] of {sizes[0]} inputs and {sizes[1]} dendrites, one "
                f"a node, got {part.in_features} and {part.num_dendrites}"
            )
    return tuple(part if part is not None and part.nnz else None for part in synapses)


def _on_branches(c: Connectivity, branches: Connectivity) -> Connectivity:
    """The same synapses, in blocks of the first level of nodes in place of somas."""
    return Connectivity(
        c.crow_indices,
        c.col_indices,
        branches.crow_indices,
        c.in_features,
        c.in_shape,
        c.channels_first,
    )
