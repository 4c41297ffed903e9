"""Whole networks in one file: `save` and `load`, without pickle and without the seed.

The file is a safetensors file. It holds the state dict, structure included, and in its header a
JSON description of the modules. Loading builds the modules of a fixed table and runs no code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ._replace import replaced
from .nn import DendriticLayer, SparseLinear

_KEY = "dendrite_kernels"  # in the header of the file
_VERSION = 1
_UNREADABLE = (AttributeError, KeyError, RuntimeError, TypeError, ValueError, SafetensorError)

# Each module that a file may hold, with the attributes that are its constructor's options.
_OPTIONS: dict[type[nn.Module], tuple[str, ...]] = {
    DendriticLayer: DendriticLayer.OPTIONS,
    SparseLinear: SparseLinear.OPTIONS,
    nn.Linear: ("in_features", "out_features"),
    nn.Identity: (),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Dropout: ("p", "inplace"),
    nn.ReLU: ("inplace",),
    nn.LeakyReLU: ("negative_slope", "inplace"),
    nn.ELU: ("alpha", "inplace"),
    nn.GELU: ("approximate",),
    nn.SiLU: ("inplace",),
    nn.Sigmoid: (),
    nn.Tanh: (),
    nn.Softplus: ("beta", "threshold"),
    nn.Softmax: ("dim",),
    nn.LogSoftmax: ("dim",),
}
_TYPES = {kind.__name__: kind for kind in _OPTIONS}


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a network to exactly `path`; a reader never sees half a file.

    Args:
        model: a DendriticLayer, a SparseLinear, a network of dendrite_kernels.models, or any
            nn.Sequential of them, nn.Linear, dropout, flatten and activations without parameters.
        path: of the file, which safetensors can read too.

    Raises:
        TypeError: the model holds a module of another type: save its state_dict() instead.
        ValueError: two modules share a parameter, or hold one that is not of their type.
        OSError: the file cannot be written.
    """
    described = _describe(model, "model")
    state = model.state_dict()
    _check_parameters(model, _build(described, state, ""), state)
    header = {
        "version": _VERSION,
        "training": model.training,
        "frozen": [name for name, p in model.named_parameters() if not p.requires_grad],
        "model": described,
    }
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    with replaced(path) as temporary:
        save_file(tensors, temporary, metadata={_KEY: json.dumps(header), "format": "pt"})


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> nn.Module:
    """Read what `save` wrote: the same modules, parameters, connectivity and training mode.

    Never unpickles and draws no random numbers. Everything in the file is checked.

    Raises:
        OSError: the file cannot be opened.
        ValueError: not such a file, damaged, or of a newer version.
    """
    with open(path, "rb"):
        pass  # FileNotFoundError and the like, before safetensors words them its own way
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = json.loads((file.metadata() or {})[_KEY])
            if header["version"] != _VERSION:
                raise ValueError(f"its version is {header['version']}")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model = _build(header["model"], state, "")
        model.load_state_dict(state, assign=True)
        for name in header["frozen"]:
            model.get_parameter(name).requires_grad_(False)
        return model.train(bool(header["training"]))
    except _UNREADABLE as error:
        expected = "Expected a file written by dendrite_kernels.save"
        raise ValueError(f"{expected}, got {os.fspath(path)}: {error!r}") from error


def _describe(module: nn.Module, name: str) -> dict[str, Any]:
    """What `_build` makes the module of, besides its state."""
    if type(module) is nn.Sequential:
        children = {
            key: _describe(child, f"{name}.{key}") for key, child in module.named_children()
        }
        return {"type": "Sequential", "children": children}
    options = _OPTIONS.get(type(module))
    if options is None:
        raise TypeError(
            f"Expected modules of types Sequential, {', '.join(_TYPES)}, "
            f"got {type(module).__name__} at {name}: save its state_dict() instead"
        )
    return {"type": type(module).__name__} | {key: getattr(module, key) for key in options}


def _build(
    described: Mapping[str, Any], state: Mapping[str, torch.Tensor], prefix: str
) -> nn.Module:
    """The module described, with the structure in `state` and parameters on the meta device."""
    options = dict(described)
    kind = options.pop("type")
    if kind == "Sequential":
        sequential = nn.Sequential()
        for name, child in options["children"].items():
            sequential.add_module(name, _build(child, state, f"{prefix}{name}."))
        return sequential
    made = _TYPES[kind]
    if set(options) != set(_OPTIONS[made]):
        raise ValueError(f"Expected options {_OPTIONS[made]} of {kind}, got {sorted(options)}")
    if issubclass(made, (DendriticLayer, SparseLinear)):
        return made._of_state(state, prefix, options)
    if made is nn.Linear:
        weight, bias = state.get(f"{prefix}weight"), f"{prefix}bias" in state
        if weight is None:
            raise ValueError(f"Expected a {prefix}weight of nn.Linear, got {sorted(state)[:8]}")
        return nn.Linear(bias=bias, device="meta", dtype=weight.dtype, **options)
    return made(**options)


def _check_parameters(
    model: nn.Module, rebuilt: nn.Module, state: Mapping[str, torch.Tensor]
) -> None:
    """ValueError unless a module built anew would take the state as it is."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first != name:
            raise ValueError(f"Expected no shared parameters, got {first} and {name} the same")
    expected = set(rebuilt.state_dict())
    if expected != set(state):
        raise ValueError(
            "Expected modules with the parameters of their types, "
            f"got other ones: {sorted(expected ^ set(state))}"
        )
