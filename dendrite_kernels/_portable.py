"""Models in plain PyTorch, which tracers and compilers take apart."""

# No `from __future__ import annotations`: torch.jit.script reads the annotations of classes.

from typing import Any

import torch
from torch import nn

from ._modules import computes_as, copied, hooked, value
from .activations import Activation, function_of
from .gates import ContextGate
from .nn import DendriticLayer, SparseLinear
from .structure import Connectivity
from .tree import DendriticTree

Maybe = torch.Tensor | None

_OURS = (ContextGate, DendriticLayer, DendriticTree, SparseLinear)


@torch.fx.wrap  # symbolic_trace does not know which form x has
def _rows_of(x: torch.Tensor, features: int, shape: list[int]) -> torch.Tensor:
    """x [..., N] or images [..., *shape], see functional.dendritic_layer, as [..., N]."""
    if x.dim() > 0 and x.shape[-1] != features and list(x.shape[-len(shape) :]) == shape:
        one_channel = len(shape) == 2 and x.dim() == 4 and x.shape[1] == 1
        x = x.flatten(1 if one_channel else -len(shape))
    if x.dim() == 0 or x.shape[-1] != features:
        images = f" or [..., *{shape}]" if len(shape) > 1 else ""
        raise ValueError(f"Expected x of shape [..., {features}]{images}, got {list(x.shape)}")
    return x


def _check_dtype(x: torch.Tensor, weight: torch.Tensor) -> None:
    """TypeError for what the layer refuses: another dtype, but that autocast mixes floats."""
    if x.dtype == weight.dtype:
        return
    autocast = True  # maybe: a script that asks crashes under autocast (torch 2.13)
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        autocast = torch.is_autocast_enabled(x.device.type)
    double = x.dtype == torch.float64 or weight.dtype == torch.float64
    if double or not (autocast and x.is_floating_point()):
        raise TypeError(f"Expected x of dtype {weight.dtype} like the weight, got {x.dtype}")


class _PaddedRows(nn.Module):
    """Rows of unequal length as a rectangle: index [rows, width], weight 0 where a row is short.

    A pad points past the end of the input, where forward appends a zero.
    """

    index: torch.Tensor

    def __init__(
        self, pointer: torch.Tensor, columns: torch.Tensor, weight: torch.Tensor, inputs: int
    ) -> None:
        super().__init__()
        counts = pointer.long().diff()  # [rows]
        rows, width = counts.numel(), max(1, int(counts.max()))
        taken = torch.arange(width, device="cpu") < counts[:, None]  # [rows, width]
        index = torch.full((rows, width), inputs, device="cpu")
        index[taken] = columns.long()
        padded = weight.new_zeros((rows, width))
        padded[taken.to(weight.device)] = weight.detach()
        self.padded = not bool(taken.all())
        self.register_buffer("index", index.flatten().to(weight.device))
        self.weight = nn.Parameter(padded, requires_grad=weight.requires_grad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., inputs] -> [..., rows]
        if self.padded:
            x = nn.functional.pad(x, (0, 1))
        gathered = x.index_select(-1, self.index).unflatten(-1, self.weight.shape)
        return torch.sum(gathered * self.weight, -1)


def _bias(of: Maybe) -> nn.Parameter | None:
    return None if of is None else nn.Parameter(of.clone(), requires_grad=of.requires_grad)


class _PortableSparseLinear(nn.Module):
    def __init__(self, c: Connectivity, weight: torch.Tensor, bias: Maybe) -> None:
        super().__init__()
        self.rows = _PaddedRows(c.crow_indices, c.col_indices, weight, c.in_features)
        self.bias = _bias(bias)
        self.in_features, self.has_image = c.in_features, c.in_shape is not None
        self.in_shape = list(c.in_shape or (c.in_features,))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A torch.fx.Proxy is no tensor, and jit.trace warns of every comparison of sizes.
        if isinstance(x, torch.Tensor):
            _check_dtype(x, self.rows.weight)
        if self.has_image or (isinstance(x, torch.Tensor) and not torch.jit.is_tracing()):  # type: ignore[attr-defined]
            x = _rows_of(x, self.in_features, self.in_shape)
        # Traced programs keep no `if`, but they keep this: it fits no other width.
        u: torch.Tensor = self.rows(x.unflatten(-1, (self.in_features,)))
        return u if self.bias is None else u + self.bias


class _PortableDendriticLayer(nn.Module):
    def __init__(
        self,
        layer: DendriticLayer,
        synapse_weight: torch.Tensor,
        dendrite_bias: Maybe,
        cable_weight: torch.Tensor,
        soma_bias: Maybe,
    ) -> None:
        super().__init__()
        c = layer.connectivity
        self.synapses = _PortableSparseLinear(c, synapse_weight, dendrite_bias)
        dendrites = torch.arange(c.num_dendrites, device="cpu")
        self.cable = _PaddedRows(c.soma_ptr, dendrites, cable_weight, c.num_dendrites)
        self.bias = _bias(soma_bias)
        self.phi = _activation(layer.activation, layer.negative_slope)
        self.psi = _activation(layer.soma_activation or layer.activation, layer.negative_slope)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v = self.cable(self.phi(self.synapses(x)))
        y: torch.Tensor = self.psi(v if self.bias is None else v + self.bias)
        return y


class _PortableNodes(nn.Module):
    """A level of a tree: nodes that join their children and, maybe, synapses of their own."""

    def __init__(
        self, cable: _PortableSparseLinear, synapses: nn.Module | None, phi: Activation
    ) -> None:
        super().__init__()
        self.cable, self.synapses, self.phi = cable, synapses, phi

    def forward(self, a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        v: torch.Tensor = self.cable(a)
        if self.synapses is not None:
            v = v + self.synapses(x)
        return self.phi(v)


class _PortableTree(nn.Module):
    def __init__(self, tree: DendriticTree, synapse_weight: torch.Tensor) -> None:
        super().__init__()
        c, none = tree.connectivity, (None,) * (len(tree.chains) + 1)
        bias = none if tree.bias is None else [value(tree.bias, str(i)) for i in range(len(none))]
        self.twigs = _PortableSparseLinear(c, synapse_weight, bias[0])
        self.phi = _activation(tree.activation, tree.negative_slope)
        self.levels = nn.ModuleList()
        for level, (children, synapses) in enumerate(
            zip(tree.chains, tree.level_synapses, strict=True), 1
        ):
            weight: Any = value(tree.cable, str(level - 1))
            cable = _PortableSparseLinear(children, weight, bias[level])
            own = None
            if synapses is not None:
                image = c.in_features, c.in_shape, c.channels_first
                pattern = synapses.crow_indices, synapses.col_indices, synapses.soma_ptr
                weight = value(tree.level_weight, str(level))
                own = _PortableSparseLinear(Connectivity(*pattern, *image), weight, None)
            phi = _activation(tree.activation_of(level), tree.negative_slope)
            self.levels.append(_PortableNodes(cable, own, phi))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a: torch.Tensor = self.phi(self.twigs(x))
        for level in self.levels:
            a = level(a, x)
        return a


def _activation(name: str, negative_slope: float) -> Activation:
    """As torch.jit.script takes it: a module or a function with a name."""
    if name == "leaky_relu":
        return nn.LeakyReLU(negative_slope)
    return function_of(name, negative_slope)


def _portable(name: str, layer: nn.Module) -> nn.Module:
    """What stands for a layer of ours."""
    assert isinstance(layer, _OURS)
    where = f"{type(layer).__name__} {name!r}"
    if not computes_as(layer, *_OURS):
        raise ValueError(f"Expected layers without a forward of their own, got {where}")
    if hooked(layer):
        raise ValueError(f"Expected layers without hooks, got {where}: remove its hooks first")
    if isinstance(layer, ContextGate):
        raise ValueError(f"Expected layers without gates, got {where}")
    plain: nn.Module
    if isinstance(layer, DendriticTree):
        weight: Any = value(layer, layer.WEIGHT)
        return _PortableTree(layer, weight).train(layer.training)
    values: Any = [value(layer, parameter) for parameter in layer.PARAMETERS]
    if isinstance(layer, DendriticLayer):
        plain = _PortableDendriticLayer(layer, *values)
    else:
        plain = _PortableSparseLinear(layer.connectivity, *values)
    return plain.train(layer.training)


def portable(model: nn.Module) -> nn.Module:
    """A copy of a model for runtimes without this package: ONNX, AOTInductor from C++, ...

    Every DendriticLayer, DendriticTree and SparseLinear becomes a gather, a product and a sum. That
    needs B * R * (synapses of the largest dendrite) numbers in memory: for inference, not for
    training. It computes in the dtype of the parameters and ignores precision="bf16". All else is
    copied as copy.deepcopy does, hooks of other modules too, but not hooks of parameters; it shares
    nothing with the model.

    Inputs are those of the layers, images too. A program that is traced (torch.jit.trace, ONNX,
    torch.export) takes the form of the example. It checks no dtype; one that is scripted takes any
    float but float64, as under autocast.

    Raises:
        ValueError: a layer has hooks (but those of torch.nn.utils.prune) or a forward of its own,
            or is a ContextGate.

    Example:
        torch.onnx.export(portable(model), (x,), "model.onnx", dynamic_shapes=...)
    """
    named = model.named_modules()
    return copied(model, {id(m): _portable(name, m) for name, m in named if isinstance(m, _OURS)})
