"""What `interop` asks of modules: the values of parameters, hooks, whose forward runs, copies."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, prune

Maybe = torch.Tensor | None

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip

_HARMLESS = parametrizations.__name__, f"{__package__}.plasticity"


def ordinary(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, if it has its numbers, in memory and one for each place; else ValueError."""
    kind = "lazy" if is_lazy(tensor) else "meta" if tensor.is_meta else str(tensor.layout)
    if kind != "torch.strided":
        raise ValueError(f"Expected {name} to be a dense tensor with values, got a {kind} one")
    return tensor


def check_shapes(model: nn.Module) -> None:
    """ValueError if a parameter is lazy: it has no shape yet."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"Expected parameters with shapes, got a lazy {name}: call the model once first"
            )


def current(module: nn.Module, name: str) -> Maybe:
    """A parameter as the next forward would see it, with its gradient.

    Where torch.nn.utils.prune is at work, the attribute itself lags behind.

    Raises:
        ValueError: another hook computes it, say that of torch.nn.utils.weight_norm.
    """
    original, mask = (getattr(module, f"{name}_{part}", None) for part in ("orig", "mask"))
    if original is not None and mask is not None:
        pruned: torch.Tensor = original * mask
        return pruned
    if name in vars(module) and module._forward_pre_hooks:
        raise ValueError(
            f"Expected {name} of {type(module).__name__} to be a parameter, got one that a hook "
            "computes before each forward: remove the hook first"
        )
    whole: Maybe = getattr(module, name, None)
    return whole


def value(module: nn.Module, name: str) -> Maybe:
    """`current`, detached; it says whether training changes it. ValueError if not `ordinary`."""
    with torch.enable_grad():
        found = current(module, name)
    if found is None:
        return None
    return ordinary(name, found).detach().requires_grad_(found.requires_grad)


def pruning(module: nn.Module) -> bool:
    return any(isinstance(h, prune.BasePruningMethod) for h in module._forward_pre_hooks.values())


def hooks_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The kind and the function of each hook that runs with a module or its state dict."""
    for kind in _HOOKS:
        for hook in getattr(module, kind).values():
            # weight_norm leaves one that reads old files, even where it is removed; that of a
            # plasticity.Rewirer only watches
            if getattr(hook, "__module__", None) not in _HARMLESS:
                yield kind[1:], hook


def hooked(module: nn.Module) -> bool:
    """Whether a module has hooks, other than those of torch.nn.utils.prune."""
    return not all(isinstance(hook, prune.BasePruningMethod) for _, hook in hooks_of(module))


def computes_as(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of one of the kinds, and has no forward of its own."""
    own: Any = type(module)
    return "forward" not in vars(module) and any(
        isinstance(module, kind) and own.forward is kind.forward and own.__call__ is kind.__call__
        for kind in kinds
    )


def copied(model: nn.Module, new: dict[int, Any]) -> nn.Module:
    """copy.deepcopy with other objects in the place of some, which are given by id.

    It refuses tensors that have a history, as what torch.nn.utils.prune leaves as the weight, and
    compressed ones.
    """
    memo = dict(new)
    for module in model.modules():
        if id(module) in new:
            continue
        for attribute in (*vars(module).values(), *module._buffers.values()):
            if isinstance(attribute, torch.Tensor) and not (
                attribute.is_leaf and attribute.layout is torch.strided
            ):
                memo[id(attribute)] = attribute.detach().clone()
    return copy.deepcopy(model, memo)
