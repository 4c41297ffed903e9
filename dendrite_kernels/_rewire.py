"""Rewiring a layer once: which synapses move, and all that moves with them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from . import operators
from ._growth import best, drawn, merged, places
from ._modules import ordinary
from ._subset import without_smallest
from ._validate import Array, check_size
from .nn import DendriticLayer, SparseLinear, _saved_connectivity
from .optim import StepInBackward
from .packing import difference
from .structure import Connectivity

# Handles of plasticity.freeze, each with the `rows` of dendrites that keep their synapses.
frozen: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()

Layer: TypeAlias = DendriticLayer | SparseLinear
Optimizers: TypeAlias = Optimizer | StepInBackward | None


@torch.no_grad()
def rewire(
    layer: Layer,
    optimizer: Optimizers = None,
    *,
    fraction: float,
    grow: Literal["random"] | torch.Tensor = "random",
    region: Connectivity | None = None,
    generator: torch.Generator | None = None,
) -> Connectivity:
    """Each dendrite drops its synapses of least |weight| and grows as many others, of weight 0.

    A dendrite of K synapses exchanges max(1, round(fraction * K)) of them (half to even), or as
    many as there are places to grow; a frozen one (`freeze`) none. What it drops it does not grow
    again at once. Kept synapses keep their weights and the optimizer's numbers bit for bit; those
    of new ones are 0, as are gradients. `layer.connectivity` becomes another object; no other layer
    may share the weight. Rewire between a step and the next forward.

    Args:
        layer: a DendriticLayer or SparseLinear.
        optimizer: of torch.optim, or a StepInBackward, which trains the layer's synapse weights.
        fraction: of each dendrite's synapses, from 0, which changes nothing, to 1.
        grow: "random": uniformly, as SET does. Or a score >= 0 [region.nnz] for each synapse of
            `region`, say |gradient| for RigL: the largest grow, zeros are drawn.
        region: R dendrites on N inputs, which say where each dendrite may grow; None: anywhere.
        generator: of torch, on the CPU; None: torch's own. Data-parallel processes must draw alike.

    Returns:
        The new connectivity, or the same if nothing moved.

    Raises:
        TypeError, ValueError: an argument does not fit; the layer is a shard, parametrized, pruned
            or on the meta device; a weight is NaN, a score negative or NaN; the optimizer does not
            train the weight, or holds what cannot move (LBFGS). Nothing is changed then.

    Source: SET, Mocanu et al., Nat Commun 9:2383 (2018); RigL, Evci et al., ICML 2020; for constant
    fan-in SRigL, Lasby et al., arXiv:2305.02299. Each dendrite on its own.
    """
    weight = weight_of(layer)
    tensors = [weight, *beside(weight, optimizer)]
    c = layer.connectivity
    check_region(c, region)
    check_fraction(fraction)
    scores = None if isinstance(grow, str) else _checked(grow, region)
    if scores is None and grow != "random":
        raise ValueError(f"Expected grow='random' or scores, got {grow!r}")
    free = places(c, region)
    counts = np.diff(c.crow_indices.numpy())
    wanted = np.maximum(np.rint(fraction * counts), fraction > 0).astype(np.int64)
    wanted = np.minimum(np.minimum(wanted, counts), free.counts)
    for handle in frozen.get(layer, ()):
        wanted[handle.rows.numpy()] = 0
    kept = without_smallest(c, weight, wanted)
    if not wanted.any():
        return c
    if scores is None:
        new = drawn(free, wanted, generator)
    else:
        new = best(free, wanted, scores, generator)
    connectivity, source = merged(c, kept, new)
    place = torch.from_numpy(source).to(weight.device)
    is_new = place < 0
    place = place.clamp(min=0)
    moved = [tensor[place].masked_fill(is_new, 0) for tensor in tensors]

    def write() -> None:
        for tensor, values in zip(tensors, moved, strict=True):
            tensor.copy_(values)
        connect(layer, connectivity)

    wholly(write)
    return connectivity


def candidates(
    connectivity: Connectivity,
    count: int,
    *,
    region: Connectivity | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Connectivity, torch.Tensor]:
    """The synapses of a connectivity and, in each dendrite, `count` others drawn uniformly.

    With weight 0 the others change no output, and their gradients are those of synapses that do
    not exist: `rewire(layer, grow=gradient.abs(), region=union)`.

    Args:
        connectivity: R dendrites on N inputs.
        count: M, for each dendrite; all there are, where they are fewer.
        region, generator: as in `rewire`.

    Returns:
        The union, and which of its synapses are new: bool [union.nnz].

    Raises:
        TypeError, ValueError: count is not a positive integer, or a region of another size.
    """
    if not isinstance(connectivity, Connectivity):
        raise TypeError(f"Expected a Connectivity, got {type(connectivity).__name__}")
    count = check_size("count", count)
    check_region(connectivity, region)
    free = places(connectivity, region)
    new = drawn(free, np.minimum(free.counts, count), generator)
    union, source = merged(connectivity, np.ones(connectivity.nnz, np.bool_), new)
    return union, torch.from_numpy(source < 0)


def adopt(layer: Layer, state: Mapping[str, Any], prefix: str = "") -> None:
    """Load a state dict of a rewired layer into one that it was before: connectivity, then values.

    `load_state_dict` refuses another connectivity, as weights mean nothing without theirs. This
    takes it over, if every dendrite has as many synapses as before; in_shape and labels stay.
    Load the optimizer's state as usual. Of a grown layer, `from_state_dict` makes it anew.

        plasticity.adopt(model[0], state, "0.")
        model.load_state_dict(state)

    Args:
        layer: a DendriticLayer or SparseLinear.
        state: of a layer like it, or of a model in which its keys begin with `prefix`.
        prefix: see state.

    Raises:
        TypeError, ValueError: another number of inputs, dendrites, somas or of synapses of a
            dendrite, other keys or shapes, or a damaged state. Nothing is changed then.
    """
    weight, c = weight_of(layer), layer.connectivity
    own = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    expected = {name: list(p.shape) for name, p in layer.named_parameters()}
    got = {name: _shape(value) for name, value in own.items() if name != "_extra_state"}
    if got != expected or "_extra_state" not in own:
        raise ValueError(f"Expected _extra_state and {expected} in the state, got {got}")
    for name in expected:
        ordinary(name, own[name])
    try:
        saved = _saved_connectivity(own["_extra_state"], weight.numel())
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"Expected the state of a layer, got {error!r}") from error
    same_sizes = saved.in_features == c.in_features and saved.crow_indices.equal(c.crow_indices)
    if not same_sizes or not saved.soma_ptr.equal(c.soma_ptr):
        raise ValueError(f"Expected a state of this layer rewired. {difference(c, saved)}")
    image = c.in_shape, c.channels_first
    columns = saved.col_indices
    made = Connectivity(c.crow_indices, columns, c.soma_ptr, c.in_features, *image, c.labels)

    def write() -> None:
        connect(layer, made)
        layer.load_state_dict(own)

    wholly(write)


def _shape(value: Any) -> Any:
    """Of a tensor with values; of anything else what it is."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return "no values" if value.is_meta else list(value.shape)


def wholly(write: Callable[[], None]) -> None:
    """All that `write` writes, even where a signal interrupts it: once more then, from its start.

    It must allocate next to nothing, so that nothing else is likely to stop it.
    """
    try:
        write()
    except BaseException:
        write()
        raise


def connect(layer: Layer, connectivity: Connectivity) -> None:
    layer.connectivity = connectivity
    operators.index_tensors(connectivity)  # compiled code cannot mark them


def weight_of(layer: Layer) -> torch.nn.Parameter:
    """Of the synapses, where it can be rewired."""
    if not isinstance(layer, (DendriticLayer, SparseLinear)):
        raise TypeError(f"Expected a DendriticLayer or SparseLinear, got {type(layer).__name__}")
    weight = layer.whole_parameters()[layer.WEIGHT]
    if type(weight.data) is not torch.Tensor:
        kind = type(weight.data).__name__
        raise TypeError(f"Expected {layer.WEIGHT} to be an ordinary tensor, got a {kind}")
    return weight


def beside(weight: torch.nn.Parameter, optimizer: Optimizers) -> list[torch.Tensor]:
    """What has a number for each synapse: a gradient and the optimizer's state."""
    own = trainers(weight, optimizer, "synapse weights")
    found = [] if weight.grad is None else [weight.grad]
    return [*found, *(state[name] for state, name in numbers_of(weight, own))]


def trainers(
    parameter: torch.nn.Parameter, optimizer: Optimizers, what: str = "parameters"
) -> list[Optimizer]:
    """The optimizers of torch.optim that train it, whose state can move with its numbers."""
    if optimizer is None:
        return []
    if not isinstance(optimizer, (Optimizer, StepInBackward)):
        kind = type(optimizer).__name__
        raise TypeError(f"Expected an optimizer of torch.optim or StepInBackward, got {kind}")
    each = optimizer.optimizers if isinstance(optimizer, StepInBackward) else [optimizer]
    own = [o for o in each if any(p is parameter for g in o.param_groups for p in g["params"])]
    if not own:
        raise ValueError(f"Expected an optimizer of the layer's {what}, got one of others")
    if any(isinstance(one, LBFGS) for one in own):
        raise ValueError("Expected an optimizer whose state is by synapse, got LBFGS")
    return own


def numbers_of(
    parameter: torch.nn.Parameter, own: list[Optimizer]
) -> list[tuple[dict[str, Any], str]]:
    """Where optimizers keep tensors of the parameter's shape: a state and a name in it."""
    return [
        (state, name)
        for state in (one.state.get(parameter, {}) for one in own)
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape
    ]


def check_region(c: Connectivity, region: Connectivity | None) -> None:
    if region is None:
        return
    if not isinstance(region, Connectivity):
        raise TypeError(f"Expected a Connectivity as region, got {type(region).__name__}")
    expected, got = ((r.num_dendrites, r.in_features) for r in (c, region))
    if got != expected:
        raise ValueError(
            f"Expected a region of {expected[0]} dendrites on {expected[1]} inputs, "
            f"got {got[0]} on {got[1]}"
        )


def check_fraction(fraction: float) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"Expected a fraction from 0 to 1, got {fraction}")


def _checked(scores: Any, region: Connectivity | None) -> Array:
    """Scores as an array, one for each synapse of the region."""
    if not isinstance(scores, torch.Tensor):
        raise TypeError(f"Expected scores to be a tensor, got {type(scores).__name__}")
    if region is None:
        raise ValueError("Expected a region beside scores, whose synapses they score, got None")
    if scores.shape != (region.nnz,):
        raise ValueError(f"Expected scores of shape [{region.nnz}], got {list(scores.shape)}")
    wrong = int((~(scores >= 0)).sum())
    if wrong:
        raise ValueError(f"Expected scores >= 0, got {wrong} that are negative or NaN")
    return scores.detach().double().cpu().numpy()
