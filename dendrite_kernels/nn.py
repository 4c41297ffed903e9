"""Modules: parameters on the synapses that exist, their initialisation, their state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, get_args

import torch
from torch import nn

from . import activations, functional, operators
from ._modules import current, ordinary
from ._subset import Amount, largest, subset
from ._winners import KWinners as KWinners  # beside the layers, for whom it is made
from .activations import ActivationName
from .packing import difference, pack, unpack
from .structure import Connectivity

Init = Literal["fan_in", "paper"]

if TYPE_CHECKING:
    from typing_extensions import Self, TypedDict, Unpack

    class Options(TypedDict, total=False):
        """What a state does not hold; a SparseLinear has no activations."""

        activation: ActivationName
        negative_slope: float
        soma_activation: ActivationName | None
        init: Init
        precision: functional.Precision | None
        reduce: functional.Reduce


def _check_init(init: str) -> None:
    if init not in get_args(Init):
        raise ValueError(f"Expected init of {sorted(get_args(Init))}, got {init!r}")


def _fan_in_bound(counts: torch.Tensor, negative_slope: float) -> torch.Tensor:
    """He et al. (2015) uniform bound of each row, sqrt(6 / ((1 + slope^2) fan_in)); counts [R]."""
    return (6 / ((1 + negative_slope**2) * counts.clamp(min=1).double())).sqrt()


def glorot_bound(fan_in: int, fan_out: int) -> float:
    """Glorot & Bengio (2010) uniform bound of a dense [fan_out, fan_in] matrix."""
    return math.sqrt(6 / (fan_in + fan_out))


@torch.no_grad()
def _uniform(
    weight: torch.Tensor, bound: torch.Tensor | float, generator: torch.Generator | None = None
) -> None:
    if not isinstance(weight, nn.Parameter):  # what is drawn would not reach the parameter
        raise RuntimeError(
            "Expected parameters to draw, got a weight that is parametrized or pruned: draw first"
        )
    if not weight.is_meta:
        weight.uniform_(-1, 1, generator=generator).mul_(
            torch.as_tensor(bound, dtype=weight.dtype, device=weight.device)
        )


@torch.no_grad()
def _init_rows(
    weight: torch.Tensor,
    pointer: torch.Tensor,
    negative_slope: float,
    fan_in: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Uniform in each row's own bound; `pointer` says which weights form a row.

    `fan_in` [rows], where a row has other weights beside these.
    """
    counts = operators.beside(weight, pointer).long().diff()
    fan_in = counts if fan_in is None else operators.beside(weight, fan_in)
    bound = _fan_in_bound(fan_in, negative_slope)
    _uniform(weight, bound.repeat_interleave(counts, output_size=weight.numel()), generator)


class _Sparse(nn.Module):
    """What both layers share: the connectivity, and its place in the state dict."""

    WEIGHT: ClassVar[str]  # the parameter that has one number for each synapse
    BIAS: ClassVar[str]
    PARAMETERS: tuple[str, ...]
    OPTIONS: ClassVar[tuple[str, ...]]  # of the constructor, beside what a state holds
    precision: functional.Precision | None

    def __init__(self, connectivity: Connectivity, init: Init) -> None:
        super().__init__()
        if not isinstance(connectivity, Connectivity):
            raise TypeError(f"Expected a Connectivity, got {type(connectivity).__name__}")
        _check_init(init)
        self.connectivity = connectivity
        self.init = init
        operators.index_tensors(connectivity)  # compiled code cannot mark them

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        operators.index_tensors(self.connectivity)

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"Expected modules that TorchScript compiles, got {type(self).__name__}: use "
            "torch.jit.trace, or script dendrite_kernels.interop.portable(model)"
        )

    def _precision_repr(self) -> str:
        return "" if self.precision is None else f", precision={self.precision}"

    def described(self) -> Connectivity:
        """The connectivity that a state dict holds: of the whole layer, where this is a shard."""
        return self.connectivity

    def _packed(self, connectivity: Connectivity) -> torch.Tensor:
        """The extra state of such a layer on another connectivity."""
        return pack(connectivity)

    def get_extra_state(self) -> torch.Tensor:
        """The connectivity as a new uint8 tensor: weights mean nothing without it.

        A tensor, so that tools which take tensors only carry it: see dendrite_kernels.packing.
        """
        return self._packed(self.described())

    def set_extra_state(self, state: Any) -> None:
        """RuntimeError unless `state` is that of a layer of this connectivity."""
        expected = self.described()
        try:
            saved = _saved_connectivity(state, expected.nnz)
            reason = None if saved == expected else difference(expected, saved)
        except (TypeError, ValueError, KeyError) as error:
            reason = str(error)
        if reason is not None:
            raise RuntimeError(
                f"Expected a state of {expected}, got another one. {reason}. "
                f"{type(self).__name__}.from_state_dict makes a layer with the state's connectivity"
            )

    def prune(self, amount: Amount) -> Self:
        """A new layer without the synapses of least |weight| in each dendrite.

        What remains is copied: weights, biases, options, device, dtype, requires_grad and mode.
        Hooks are not. An optimizer must be given the new layer's parameters.

        Args:
            amount: a fraction from 0 to 1 of each dendrite's synapses, rounded to a number (half to
                even), or as an int how many; a dendrite that has fewer keeps none.

        Raises:
            TypeError, ValueError: not such an amount; a weight is NaN; or the layer is a shard,
                parametrized, on the meta device, or under torch.nn.utils.prune
                (interop.from_pruned takes that).
        """
        values = self.whole_parameters()
        return self._without(largest(self.connectivity, values[self.WEIGHT], amount), values)

    def whole_parameters(self) -> dict[str, nn.Parameter]:
        """By name; ValueError unless they are all that there is, with values, in this layer."""
        values = dict(self.named_parameters())
        if not values.keys() <= set(self.PARAMETERS) or self.described() is not self.connectivity:
            raise ValueError(
                f"Expected a whole layer with parameters {list(self.PARAMETERS)}, "
                f"got {type(self).__name__} with {list(values)}"
            )
        for name, value in values.items():
            ordinary(name, value)
        return values

    def _without(self, kept: torch.Tensor, values: Mapping[str, torch.Tensor]) -> Self:
        """A new layer of the synapses True in `kept` [nnz], with these values of parameters."""
        connectivity, weight = subset(self.connectivity, kept), values[self.WEIGHT].detach()
        extra = self._packed(connectivity)
        rest = {self.WEIGHT: weight[kept.to(weight.device)], "_extra_state": extra}
        options = {name: getattr(self, name) for name in self.OPTIONS}
        layer = type(self).from_state_dict({**values, **rest}, **options)
        layer.connectivity = connectivity  # equal, with labels, which a state does not hold
        operators.index_tensors(connectivity)
        for name, value in values.items():
            layer.get_parameter(name).requires_grad_(value.requires_grad)
        return layer.train(self.training)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], prefix: str = "", **options: Unpack[Options]
    ) -> Self:
        """The layer whose state dict this is, on its connectivity.

        Args:
            state: of a layer, or of a model in which its keys begin with `prefix`, say "0.".
            prefix: see state.
            options: what a state does not hold: activation, negative_slope, soma_activation, init,
                precision, or reduce of a ContextGate. Device, dtype and whether there is a bias are
                those of the state.

        Raises:
            ValueError: no such state, or a damaged one.
        """
        layer = cls._of_state(state, prefix, options)
        layer = layer.to_empty(device=state[prefix + cls.WEIGHT].device)
        names = (name for name, _ in layer.named_parameters())
        keys = [key for key in (*names, "_extra_state") if prefix + key in state]
        try:
            layer.load_state_dict({key: state[prefix + key] for key in keys})
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        return layer

    @classmethod
    def _of_state(cls, state: Mapping[str, Any], prefix: str, options: Mapping[str, Any]) -> Self:
        """The layer that fits a state, its parameters on the meta device."""
        names = prefix + cls.WEIGHT, prefix + "_extra_state"
        weight, packed = map(state.get, names)
        if not isinstance(weight, torch.Tensor) or packed is None:
            raise ValueError(
                f"Expected a state with {list(names)}, got keys {sorted(map(str, state))[:8]}"
            )
        check_numbers(names[0], weight)
        try:
            connectivity = _saved_connectivity(packed, weight.numel())
        except (TypeError, KeyError, RuntimeError) as error:
            raise ValueError(f"Expected the state of a {cls.__name__}: {error}") from error
        make: Any = cls  # each layer has options of its own
        bias = state.get(prefix + cls.BIAS) is not None
        layer: Self = make(connectivity, bias=bias, device="meta", dtype=weight.dtype, **options)
        return layer

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # First the connectivity: a mismatch must leave the parameters untouched.
        key = prefix + "_extra_state"
        tensors = *self.named_parameters(), *self.named_buffers()  # of parametrizations too
        own = {prefix + name: tensor for name, tensor in tensors}
        try:
            if key in state_dict:
                self.set_extra_state(state_dict[key])
            elif own.keys() & state_dict.keys():
                raise RuntimeError(
                    f"Missing key {key!r}, the connectivity that these weights belong to. If it is "
                    f"this layer's, say so by state[{key!r}] = layer.get_extra_state()"
                )
        except RuntimeError as error:
            error_msgs.append(str(error))
            state_dict.update(own)  # parametrizations load next, then: what they hold
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def check_numbers(name: str, weight: torch.Tensor) -> None:
    """ValueError unless each synapse has a number of its own in memory: a file of a few bytes may
    hold an expanded tensor, which would make a layer of any size.
    """
    strided = weight.layout is torch.strided and weight.dim() == 1
    if not strided or (weight.stride(0) == 0 and weight.numel() > 1):
        raise ValueError(
            f"Expected {name} of one dimension, with a number for each synapse, "
            f"got {list(weight.shape)}, expanded or of another layout"
        )


def _saved_connectivity(state: Any, nnz: int) -> Connectivity:
    """The connectivity in an extra state, also of version 0.1, where it was a dict."""
    if not isinstance(state, dict):
        return unpack(state, nnz)
    names = "crow_indices", "col_indices", "in_features", "soma_ptr"
    return Connectivity.from_csr(*map(state.__getitem__, names))


class DendriticLayer(_Sparse):
    """A layer of dendritic neurons: sparse synapses -> dendrites -> cable -> somas.

    Stands where a masked pair of Linear layers stood; parameters exist only for synapses that do.

    Parameters:
        synapse_weight [nnz], dendrite_bias [R], cable_weight [R], soma_bias [S].

    Args:
        connectivity: N inputs, R dendrites, S somas.
        bias: whether dendrites and somas have one.
        activation, negative_slope: of dendrites and somas, see functional.dendritic_layer.
        soma_activation: of somas, None: as the dendrites. "identity" gives the sums at the somas.
        init: "fan_in": uniform with the true fan-in of each dendrite and soma (He et al. 2015), so
            that activations keep their scale. "paper": Glorot uniform with the fans of the dense
            matrices, then masked, as in Chavlis & Poirazi (2025; docs/equations.md, section 4):
            small activations and a slow start. Biases start at 0.
        precision: "bf16" rounds the input to bfloat16, see functional.dendritic_layer.
        device, dtype: of the parameters; with float16 and bfloat16 sums are float32.

    Shape: [..., N] -> [..., S]; where the connectivity has an in_shape, images [..., *in_shape] too
        and, for an in_shape (H, W), [B, 1, H, W].

    Raises:
        TypeError, ValueError: an argument or an input does not fit.
    """

    WEIGHT, BIAS = "synapse_weight", "dendrite_bias"
    PARAMETERS = "synapse_weight", "dendrite_bias", "cable_weight", "soma_bias"
    OPTIONS = "activation", "negative_slope", "soma_activation", "init", "precision"
    soma_activation: ActivationName | None = None  # of layers pickled before they had one

    def __init__(
        self,
        connectivity: Connectivity,
        *,
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
        functional.check_activation(activation, negative_slope)
        functional.check_dtype("parameters", dtype or torch.get_default_dtype())
        activations.slopes_of(activation, soma_activation, negative_slope)
        self.activation, self.soma_activation = activation, soma_activation
        functional.check_precision(precision)
        self.negative_slope = float(negative_slope)
        self.precision = precision
        c = connectivity

        def parameter(size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype))

        self.synapse_weight = parameter(c.nnz)
        self.dendrite_bias = parameter(c.num_dendrites) if bias else None
        self.cable_weight = parameter(c.num_dendrites)
        self.soma_bias = parameter(c.num_somas) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew from torch's generator."""
        c = self.connectivity
        self._draw_synapses(self.synapse_weight, c)
        if self.init == "paper":
            _uniform(self.cable_weight, glorot_bound(c.num_dendrites, c.num_somas))
        else:
            _init_rows(self.cable_weight, c.soma_ptr, self._slope())
        for bias in (self.dendrite_bias, self.soma_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def _draw_synapses(
        self, weight: torch.Tensor, c: Connectivity, generator: torch.Generator | None = None
    ) -> None:
        """Initial weights of a layer like this one on another connectivity."""
        if self.init == "paper":
            _uniform(weight, glorot_bound(c.in_features, c.num_dendrites), generator)
        else:
            _init_rows(weight, c.crow_indices, self._slope(), generator=generator)

    def _slope(self) -> float:
        """For the scale of initial weights."""
        return activations.slope_of(self.activation, self.negative_slope) or 0.0

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """[..., N] -> [..., S]: the layer that functional.dendritic_layer computes.

        `gate` multiplies what dendrites send: [R], or [..., R] with one for each sample.
        """
        return functional.dendritic_layer(
            x,
            self.synapse_weight,
            self.dendrite_bias,
            self.cable_weight,
            self.soma_bias,
            self.connectivity,
            activation=self.activation,
            negative_slope=self.negative_slope,
            soma_activation=self.soma_activation,
            precision=self.precision,
            gate=gate,
        )

    def dendrites(self, x: torch.Tensor) -> torch.Tensor:  # [..., N] -> [..., R]
        """What the dendrites send to the somas: a = phi(u), after their activation.

        Differentiable. Forward keeps no a, so this computes it anew; hooks of the module do not
        run. The dendrites of soma s are columns connectivity.soma_ptr[s] to soma_ptr[s + 1].

        Args:
            x: [..., N] or images, as forward takes them.

        Returns:
            [..., R], before the cable weights. With low precision u is rounded, then a.

        Raises:
            TypeError, ValueError: as forward.

        Source: docs/equations.md, section 1.
        """
        weight, bias = current(self, "synapse_weight"), current(self, "dendrite_bias")
        assert weight is not None
        u = functional.sparse_linear(x, weight, bias, self.connectivity, precision=self.precision)
        return activations.function_of(self.activation, self.negative_slope)(u)

    def extra_repr(self) -> str:
        slope = f"({self.negative_slope:g})" if self.activation == "leaky_relu" else ""
        bias = self.dendrite_bias is not None
        soma = f", soma_activation={self.soma_activation}" if self.soma_activation else ""
        options = f"bias={bias}, activation={self.activation}{slope}{soma}, init={self.init}"
        return f"{self.connectivity}, {options}{self._precision_repr()}"


class SparseLinear(_Sparse):
    """A linear layer whose weight has only the synapses of a connectivity (its somas play no part).

    Parameters:
        weight [nnz], bias [R].

    Args:
        connectivity: N inputs, R outputs.
        bias: whether outputs have one.
        init: "fan_in" or "paper", see DendriticLayer.
        negative_slope: of the leaky ReLU that follows, for the scale of "fan_in".
        precision: "bf16" rounds the input to bfloat16, see functional.dendritic_layer.
        device, dtype: of the parameters; with float16 and bfloat16 sums are float32.

    Shape: [..., N] -> [..., R]; images as for DendriticLayer.

    Raises:
        TypeError, ValueError: an argument or an input does not fit.
    """

    WEIGHT, BIAS = "weight", "bias"
    PARAMETERS = "weight", "bias"
    OPTIONS = "negative_slope", "init", "precision"

    def __init__(
        self,
        connectivity: Connectivity,
        *,
        bias: bool = True,
        init: Init = "fan_in",
        negative_slope: float = 0.1,
        precision: functional.Precision | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(connectivity, init)
        functional.check_activation("leaky_relu", negative_slope)
        functional.check_dtype("parameters", dtype or torch.get_default_dtype())
        functional.check_precision(precision)
        self.negative_slope = float(negative_slope)
        self.precision = precision
        rows = connectivity.num_dendrites
        self.weight = nn.Parameter(torch.empty(connectivity.nnz, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew from torch's generator."""
        c = self.connectivity
        if self.init == "paper":
            _uniform(self.weight, glorot_bound(c.in_features, c.num_dendrites))
        else:
            _init_rows(self.weight, c.crow_indices, self.negative_slope)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., N] -> [..., R]: the layer that functional.sparse_linear computes."""
        return functional.sparse_linear(
            x, self.weight, self.bias, self.connectivity, precision=self.precision
        )

    def extra_repr(self) -> str:
        options = f"bias={self.bias is not None}, init={self.init}{self._precision_repr()}"
        return f"{self.connectivity}, {options}"
