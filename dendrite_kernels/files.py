"""Whole networks in one file: `save` and `load`, without pickle and without the seed.

The file is a safetensors file. It holds the state dict, structure included, and in its header a
JSON description of the modules. Loading builds the modules of a fixed table and runs no code.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ._modules import hooks_of
from ._replace import check_regular, replaced
from .gates import ContextGate
from .nn import DendriticLayer, KWinners, SparseLinear, _Sparse
from .tree import DendriticTree

_KEY = "dendrite_kernels"  # in the header of the file
_VERSION = 2
_UNREADABLE = (
    AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError, SafetensorError,
)  # fmt: skip

Check = Callable[[object], bool]


def _is(*types: type) -> Check:
    return lambda value: type(value) in types


def _any(_: object) -> bool:
    return True


_FLAG, _SIZE, _NUMBER, _DIM = _is(bool), _is(int), _is(int, float), _is(int, type(None))

# Each module that a file may hold, with the attributes that are its constructor's options and what
# they may be. Our layers check theirs; torch's would fail in forward.
_OPTIONS: dict[type[nn.Module], dict[str, Check]] = {
    DendriticLayer: dict.fromkeys(DendriticLayer.OPTIONS, _any),
    SparseLinear: dict.fromkeys(SparseLinear.OPTIONS, _any),
    DendriticTree: dict.fromkeys(DendriticTree.OPTIONS, _any),
    ContextGate: dict.fromkeys(ContextGate.OPTIONS, _any),
    KWinners: {"fraction": _any},
    nn.Linear: {"in_features": _SIZE, "out_features": _SIZE},
    nn.Identity: {},
    nn.Flatten: {"start_dim": _SIZE, "end_dim": _SIZE},
    nn.Dropout: {"p": _NUMBER, "inplace": _FLAG},
    nn.ReLU: {"inplace": _FLAG},
    nn.LeakyReLU: {"negative_slope": _NUMBER, "inplace": _FLAG},
    nn.ELU: {"alpha": _NUMBER, "inplace": _FLAG},
    nn.GELU: {"approximate": ("none", "tanh").__contains__},
    nn.SiLU: {"inplace": _FLAG},
    nn.Sigmoid: {},
    nn.Tanh: {},
    nn.Softplus: {"beta": _NUMBER, "threshold": _NUMBER},
    nn.Softmax: {"dim": _DIM},
    nn.LogSoftmax: {"dim": _DIM},
}
_TYPES = {kind.__name__: kind for kind in _OPTIONS}


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a network to exactly `path`; a reader never sees half a file.

    Args:
        model: a DendriticLayer, a DendriticTree, a SparseLinear, a ContextGate, a network of
            dendrite_kernels.models, or any nn.Sequential of them, nn.Linear, KWinners, dropout,
            flatten and activations without parameters, which may be used several times.
        path: of the file, which safetensors can read too.

    Raises:
        TypeError: the model holds a module of another type: save its state_dict() instead.
        ValueError: two modules share a parameter or memory, or one is used twice; a parameter is on
            the meta device; a module holds a parameter or an option that is not of its type, has
            hooks (as pruned ones do) or a forward of its
            own: a file cannot hold these. Nor hooks of parameters, which only training needs: they
            are left out, so that a model can be saved while optim.StepInBackward trains it.
        OSError: the file cannot be written.
    """
    described = _describe(model, "", {})
    _check_sharing(model)
    state = model.state_dict()
    _check_values(state)
    header = {
        "version": _VERSION,
        "evaluating": [name for name, module in _modules(model) if not module.training],
        "frozen": [name for name, p in model.named_parameters() if not p.requires_grad],
        "model": described,
    }
    try:
        text = json.dumps(header, default=operator.methodcaller("item"))  # of numpy numbers
        _model(json.loads(text), state)
    except _UNREADABLE as error:
        expected = "Expected modules with the options and parameters of their types"
        raise ValueError(f"{expected}, got other ones: {error}") from error
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    metadata = {_KEY: text, "format": "pt"}
    with replaced(path) as temporary:
        with open(temporary, "xb"):
            pass  # PermissionError and the like, before safetensors words them its own way
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"Expected to write {os.fspath(path)}, got {error}") from error
        except RuntimeError as error:
            raise ValueError(f"Expected parameters that share no memory, got {error}") from error


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> nn.Module:
    """Read what `save` wrote: the same modules, parameters, connectivity and training modes.

    Never unpickles and draws no random numbers. Checked are the types of modules and of their
    options, the names and shapes of parameters, and the connectivity. Whether the values of options
    make sense, and whether the modules fit each other, shows in forward.

    Raises:
        OSError: the file cannot be opened.
        ValueError: not such a file, damaged, or of another version.
        RuntimeError and the like: of torch, where there is no such device.
    """
    device = torch.device(device)
    check_regular(path)
    with open(path, "rb"):
        pass  # FileNotFoundError and the like, before safetensors words them its own way
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            if header["version"] != _VERSION:
                raise ValueError(f"its version is {header['version']}")
            # copies: the tensors are the mapped file, which may be overwritten or cut short
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        model = _model(header, state)
    except _UNREADABLE as error:
        expected = "Expected a file written by dendrite_kernels.save"
        raise ValueError(f"{expected}, got {os.fspath(path)}: {error!r}") from error
    return model.to(device)  # whose errors are not the file's


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All, under each of their names."""
    yield from model.named_modules(remove_duplicate=False)


def _model(header: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> nn.Module:
    """What a file with this header and this state holds."""
    model = _build(header["model"], state, "", {})
    model.load_state_dict(state, assign=True)
    for name in header["frozen"]:
        model.get_parameter(name).requires_grad_(False)
    modules = dict(_modules(model))
    for module in modules.values():
        module.training = True
    for name in header["evaluating"]:
        modules[name].training = False
    return model


def _describe(module: nn.Module | None, prefix: str, seen: dict[int, str]) -> dict[str, Any]:
    """What `_build` makes the module of, besides its state; `seen`: the prefix of each so far."""
    name = f"model.{prefix}"[:-1] if prefix else "model"
    if module is None or type(module) not in (nn.Sequential, *_OPTIONS):
        raise TypeError(
            f"Expected modules of types Sequential, {', '.join(_TYPES)}, "
            f"got {type(module).__name__} at {name}: save its state_dict() instead"
        )
    _check_forward(module, name)
    if type(module) is nn.Sequential:
        children = {
            key: _describe(child, f"{prefix}{key}.", seen) for key, child in module._modules.items()
        }
        return {"type": "Sequential", "children": children}
    first = seen.setdefault(id(module), prefix)
    if first != prefix:
        return {"type": "again", "module": first}
    kind = type(module)
    return {"type": kind.__name__} | {key: getattr(module, key) for key in _OPTIONS[kind]}


def _build(
    described: Mapping[str, Any],
    state: Mapping[str, torch.Tensor],
    prefix: str,
    built: dict[str, nn.Module],
) -> nn.Module:
    """The module described, with the structure in `state` and parameters on the meta device.

    `built`: those so far, by prefix, which the file may use again.
    """
    options = dict(described)
    kind = options.pop("type")
    if kind == "Sequential":
        sequential = nn.Sequential()
        for name, child in options["children"].items():
            sequential.add_module(name, _build(child, state, f"{prefix}{name}.", built))
        return sequential
    if kind == "again":
        return built[options["module"]]
    if kind not in _TYPES:
        raise ValueError(f"Expected modules of types Sequential, {', '.join(_TYPES)}, got {kind!r}")
    built[prefix] = _layer(_TYPES[kind], options, state, prefix)
    return built[prefix]


def _layer(
    made: type[nn.Module],
    options: dict[str, Any],
    state: Mapping[str, torch.Tensor],
    prefix: str,
) -> nn.Module:
    kind, checks = made.__name__, _OPTIONS[made]
    if set(options) != set(checks):
        raise ValueError(f"Expected options {list(checks)} of {kind}, got {sorted(options)}")
    for key, value in options.items():
        if not checks[key](value):
            raise ValueError(f"Expected an option {key} that {kind} takes, got {value!r}")
    if issubclass(made, _Sparse):
        return made._of_state(state, prefix, options)
    if made is nn.Linear:
        weight, bias = state.get(f"{prefix}weight"), f"{prefix}bias" in state
        if weight is None:
            raise ValueError(f"Expected a {prefix}weight of nn.Linear, got {sorted(state)[:8]}")
        return nn.Linear(bias=bias, device="meta", dtype=weight.dtype, **options)
    return made(**options)


def _check_forward(module: nn.Module, name: str) -> None:
    """ValueError if the module does what its type does not say."""
    found = [kind for kind, _ in hooks_of(module)] + ["forward"] * ("forward" in vars(module))
    if found:
        raise ValueError(
            f"Expected modules as their types make them, got {', '.join(found)} at {name}: "
            "remove them, or save its state_dict() instead"
        )


def _check_sharing(model: nn.Module) -> None:
    """ValueError if a parameter has several names."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first != name:
            raise ValueError(f"Expected no shared parameters, got {first} and {name} the same")


def _check_values(state: Mapping[str, torch.Tensor]) -> None:
    """ValueError if a tensor has no values."""
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(f"Expected parameters with values, got {name} on the meta device")
