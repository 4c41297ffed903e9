"""A whole model whose pruned and masked linear layers become sparse ones."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ._masked import from_masked_dense
from ._modules import check_shapes, copied, hooked, pruning
from ._pruned import from_pruned, masked, masked_linear, under_mask
from .nn import DendriticLayer, SparseLinear

Linears = dict[str, tuple[nn.Linear, torch.Tensor]]  # under their masks, by name

_OURS = (DendriticLayer, SparseLinear)
_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # of weights that are a child's
_TENSOR_HOOKS = "_backward_hooks", "_post_accumulate_grad_hooks"


@dataclass
class Conversion:
    """What `convert` did. Modules are named as in named_modules().

    Attributes:
        converted: what a module became.
        left: linear and pruned modules that stayed, and why.
        parameters_before, parameters_after: of the whole model, frozen ones too, each once.
    """

    converted: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    parameters_before: int = 0
    parameters_after: int = 0

    def __str__(self) -> str:
        lines = [f"{self.parameters_before} -> {self.parameters_after} parameters"]
        lines += [f"{name}: {kind}" for name, kind in self.converted.items()]
        lines += [f"{name}: left, {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def convert(model: nn.Module) -> tuple[nn.Module, Conversion]:
    """A copy of a model that computes the same on the synapses that exist.

    A synapse exists where a mask is 1, whatever its weight. What becomes of a layer:

    - An nn.Linear whose weight torch.nn.utils.prune prunes: a SparseLinear.
    - A subclass of nn.Linear, or another module, with a weight [out, in], a bias [out] or None, a
      buffer `mask` [out, in] of 0 and 1, and nothing else to train: a SparseLinear. It must pass
      the trial of from_pruned, which is no proof.
    - In an nn.Sequential: two such layers, each followed by the same nn.LeakyReLU or nn.ReLU, where
      the second mask lets each input feed one output: a DendriticLayer, then three nn.Identity, so
      that the modules behind keep their places and names.
    - A SparseLinear or DendriticLayer that torch.nn.utils.prune prunes: see from_pruned.

    All else is copied as copy.deepcopy does; the model itself does not change. A module is left as
    it is, with the reason in the report, if it has hooks or parametrizations, is in several places,
    shares a parameter, or if a torch module above it reads its weight. Code of yours that reads the
    weight of a layer finds one number for each synapse. Give an optimizer the new parameters.

    The somas' outputs then come from the first of the four modules in an nn.Sequential. Code that
    walks through it, slices it or reads inside it (`for layer in body`, `body[:2]`, a hook on an
    activation) finds other values, without an error: only the whole computes the same. A subclass
    of nn.Sequential keeps its modules apart: its layers become a SparseLinear each.

    Returns:
        The copy, and what became of each layer.

    Raises:
        ValueError: a parameter is lazy, without a shape.

    Example:
        model, report = convert(model)
        print(report)
    """
    check_shapes(model)
    report = Conversion(parameters_before=_count(model))
    sharing = _sharing(model)
    linears: Linears = {}
    new: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not _has_synapses(module):
            continue
        try:
            reason = _reason(model, name, module, sharing)
            if reason is None and isinstance(module, _OURS):
                new[name] = from_pruned(module)
            elif reason is None:
                linears[name] = under_mask(module)
                new[name] = masked_linear(*linears[name]).train(module.training)
        except (TypeError, ValueError) as error:  # a mask or a dtype that does not fit
            reason = str(error)
        if reason is not None:
            report.left[name] = reason
    report.converted = {name: type(layer).__name__ for name, layer in new.items()}
    activations: list[str] = []
    for names, layer in _pairs(model, linears):
        first, _, second, _ = names
        new[first], new[second] = layer, nn.Identity()
        activations += names[1::2]
        report.converted[first] = "DendriticLayer"
        report.converted |= dict.fromkeys(names[1:], f"Identity, in the layer at {first}")
    converted = copied(model, {id(model.get_submodule(name)): m for name, m in new.items()})
    for name in activations:  # by place: one object may be the activation of many layers
        converted.set_submodule(name, nn.Identity())
    report.parameters_after = _count(converted)
    return converted, report


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ---- which modules ----


def _has_synapses(module: nn.Module) -> bool:
    """Whether a reader of the report asks what became of this module."""
    if isinstance(module, _OURS):
        return hasattr(module, f"{module.WEIGHT}_mask") or pruning(module)
    return isinstance(module, nn.Linear) or masked(module) or pruning(module)


def _sharing(model: nn.Module) -> dict[int, list[str]]:
    """The names of each module and each parameter, by id."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
        for key, parameter in module._parameters.items():
            names[id(parameter)].append(f"{name}.{key}")
    return names


def _reason(
    model: nn.Module, name: str, module: nn.Module, sharing: dict[int, list[str]]
) -> str | None:
    """Why a module stays, None if it need not."""
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript has compiled it: convert first"
    if not isinstance(module, _OURS):
        if not isinstance(module, nn.Linear) and not masked(module):
            return f"only linear layers are converted, not {kind}"
        if not hasattr(module, "weight_mask") and not masked(module):
            return "it is dense: its weight has no mask and is not pruned"
    elif not hasattr(module, f"{module.WEIGHT}_mask"):
        return "its synapses are not pruned"
    parent = model.get_submodule(name.rpartition(".")[0]) if name else None
    if isinstance(parent, _READERS):
        return f"{type(parent).__name__} reads its weight"
    return _unusual(module, sharing)


def _unusual(module: nn.Module, sharing: dict[int, list[str]]) -> str | None:
    """What keeps a module from being exchanged without a trace."""
    if len(sharing[id(module)]) > 1:
        return f"it is shared: {', '.join(sharing[id(module)])}"
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    if hooked(module):
        return "it has hooks"
    for parameter in module.parameters():
        if len(sharing[id(parameter)]) > 1:
            return f"it shares a parameter: {', '.join(sharing[id(parameter)])}"
        if any(getattr(parameter, hooks, None) for hooks in _TENSOR_HOOKS):
            return "its parameters have hooks"
    return None


# ---- what they become ----


def _pairs(model: nn.Module, linears: Linears) -> list[tuple[list[str], DendriticLayer]]:
    """The names of dendrites, activation, somas, activation; and the layer that they become."""
    found = []
    for name, module in model.named_modules():
        if type(module) is not nn.Sequential:
            continue
        names = [f"{name}.{key}".removeprefix(".") for key in module._modules]
        i = 0
        while i + 3 < len(names):
            layer = _pair(model, names[i : i + 4], linears)
            if layer is not None:
                found.append((names[i : i + 4], layer))
            i += 1 if layer is None else 4
    return found


def _pair(model: nn.Module, names: list[str], linears: Linears) -> DendriticLayer | None:
    """The layer that four modules in a row are, None if they are none."""
    if names[0] not in linears or names[2] not in linears:
        return None
    (dendrite, mask), (soma, soma_mask) = linears[names[0]], linears[names[2]]
    activation, other = (_activation(model.get_submodule(name)) for name in names[1::2])
    fits = (
        activation is not None
        and activation == other
        and soma_mask.shape[1] == mask.shape[0]
        and bool((soma_mask.sum(0) == 1).all())
        and (dendrite.bias is None) == (soma.bias is None)
        and dendrite.weight.dtype == soma.weight.dtype
        and dendrite.weight.device == soma.weight.device
    )
    if not fits:
        return None
    options: Any = activation
    layer = from_masked_dense(dendrite, mask, soma, soma_mask, **options)
    return layer.train(model.get_submodule(names[0]).training)


def _activation(module: nn.Module) -> dict[str, Any] | None:
    """The options of a DendriticLayer with this activation, None if there are none."""
    if hooked(module):
        return None
    if type(module) is nn.ReLU:
        return {"activation": "relu"}
    if type(module) is nn.LeakyReLU and 0 <= module.negative_slope < math.inf:
        return {"activation": "leaky_relu", "negative_slope": module.negative_slope}
    return None
