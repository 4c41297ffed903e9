"""Rewiring: in training, dendrites exchange weak synapses for others and keep their number.

    rewirer = plasticity.Rewirer(layer, optimizer, rule="rigl", end=7_500, seed=0)
    ...
    loss.backward()
    optimizer.step()
    rewirer.step()

The gradient of a synapse that does not exist is that of one with weight 0, which changes no output:
so a few candidates join the synapses for one step, and no array is [R, N].
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch.optim import LBFGS, Optimizer

from . import functional, operators
from ._growth import best, drawn, merged, places
from ._subset import without_smallest
from ._validate import Array, check_size
from .nn import DendriticLayer, SparseLinear, _saved_connectivity
from .optim import StepInBackward
from .packing import difference
from .structure import Connectivity, untraced

Layer: TypeAlias = DendriticLayer | SparseLinear
Optimizers: TypeAlias = Optimizer | StepInBackward | None
Rule = Literal["set", "rigl"]


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
    many as there are places to grow. What it drops it does not grow again at once. Kept synapses
    keep their weights and the optimizer's numbers bit for bit; those of new ones are 0, as are
    gradients. `layer.connectivity` becomes another object: whoever took the old one has the old
    one, and a layer that shares the weight must not exist. Rewire between a step and the next
    forward.

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
    weight = _weight(layer)
    tensors = [weight.data, *_beside(weight, optimizer)]
    c = layer.connectivity
    _check_region(c, region)
    if not 0 <= fraction <= 1:
        raise ValueError(f"Expected a fraction from 0 to 1, got {fraction}")
    scores = None if isinstance(grow, str) else _checked(grow, region)
    if scores is None and grow != "random":
        raise ValueError(f"Expected grow='random' or scores, got {grow!r}")
    free = places(c, region)
    counts = np.diff(c.crow_indices.numpy())
    wanted = np.maximum(np.rint(fraction * counts), fraction > 0).astype(np.int64)
    wanted = np.minimum(np.minimum(wanted, counts), free.counts)
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
    for tensor, values in zip(tensors, moved, strict=True):
        tensor.copy_(values)
    _connect(layer, connectivity)
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
    count = check_size("count", count)
    _check_region(connectivity, region)
    free = places(connectivity, region)
    new = drawn(free, np.minimum(free.counts, count), generator)
    union, source = merged(connectivity, np.ones(connectivity.nnz, np.bool_), new)
    return union, torch.from_numpy(source < 0)


class Rewirer:
    """Rewires a layer during training, on the schedule of RigL. Call `step` after the optimizer's.

    After step t, where `every` divides t and t < `end`, each dendrite of K synapses exchanges
    max(1, round(f K)) of them by `rewire`, with f = fraction / 2 * (1 + cos(pi t / end)).

    With "rigl" the gradients of candidates are taken in the backward pass of the step that rewires,
    on its batch and its weights; several backward calls for one step add up. They cost one more
    forward and backward of this layer, on the union, once in `every` steps; gradients that are not
    finite (a torch.amp.GradScaler skips such steps) rewire nothing. The layer keeps a forward hook.

    Where torch.distributed is initialised, the processes of its default group add up the
    candidates' gradients: all must step. Equal weights (as DDP keeps them) and an equal seed give
    equal draws.

    Args:
        layer: see `rewire`. Each layer has a Rewirer of its own, with another seed.
        optimizer: see `rewire`; None: one without state trains the layer.
        rule: "set": random growth. "rigl": the candidates with the largest |gradient|.
        every: T, in steps.
        fraction: f at the start, from 0 to 1.
        end: the step at which rewiring ends, say three quarters of all.
        candidates: of "rigl", for each dendrite; None: as many as the largest fan-in.
        region: where dendrites may grow, see `rewire`.
        seed: an int >= 0. The same seed gives the same draws, also after a checkpoint.

    Raises:
        TypeError, ValueError: an argument does not fit, or as `rewire`.

    Source: see `rewire`.
    """

    def __init__(
        self,
        layer: Layer,
        optimizer: Optimizers,
        *,
        rule: Rule = "set",
        every: int = 100,
        fraction: float = 0.3,
        end: int,
        candidates: int | None = None,
        region: Connectivity | None = None,
        seed: int,
    ) -> None:
        _beside(_weight(layer), optimizer)
        _check_region(layer.connectivity, region)
        if rule not in get_args(Rule):
            raise ValueError(f"Expected rule of {sorted(get_args(Rule))}, got {rule!r}")
        if not 0 <= fraction <= 1:
            raise ValueError(f"Expected a fraction from 0 to 1, got {fraction}")
        if candidates is None:
            candidates = int(layer.connectivity.crow_indices.diff().max()) or 1
        self.layer, self.optimizer, self.rule = layer, optimizer, rule
        self.every, self.end = check_size("every", every), check_size("end", end)
        self.fraction, self.region = fraction, region
        self.candidates = check_size("candidates", candidates)
        self._seeds = np.random.SeedSequence(seed).entropy  # TypeError, ValueError if it is none
        self.steps = 0
        self._due = self._is_due()  # a flag: compiled code would look at `steps` at each step
        self._union: tuple[Connectivity, Connectivity, torch.Tensor] | None = None
        self._scores: torch.Tensor | None = None  # [union.nnz]
        if rule == "rigl":
            layer.register_forward_hook(_Hook(self), with_kwargs=True)

    def step(self) -> bool:
        """Count a step of training, and rewire if it is time. Whether synapses may have moved.

        Raises:
            RuntimeError: with "rigl", no backward pass went through the layer since the last step.
            ValueError: as `rewire`.
        """
        due = self._due
        self.steps += 1
        self._due = self._is_due()
        return due and untraced(self._rewire)

    def _rewire(self) -> bool:
        grow: Any = "random"
        region = self.region
        if self.rule == "rigl":
            union, grow = self._union, self._scores
            self._union = self._scores = None
            if union is None or grow is None or union[0] is not self.layer.connectivity:
                raise RuntimeError(
                    "Expected a backward pass through the layer since the last step, got none"
                )
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(grow)
            if not bool(grow.isfinite().all()):
                return False
            region, grow = union[1], grow.abs()
        rewire(
            self.layer,
            self.optimizer,
            fraction=self.fraction / 2 * (1 + math.cos(math.pi * self.steps / self.end)),
            grow=grow,
            region=region,
            generator=self._generator("moves"),
        )
        return True

    def state_dict(self) -> dict[str, int]:
        """How many steps were counted: a layer and its optimizer hold all the rest."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """What `state_dict` returned; give the layer its connectivity by `adopt`."""
        self.steps = int(state["steps"])
        self._due = self._is_due()
        self._union = self._scores = None

    def _is_due(self) -> bool:
        """Whether the next step rewires."""
        return (self.steps + 1) % self.every == 0 and self.steps + 1 < self.end

    def _generator(self, use: Literal["moves", "candidates"]) -> torch.Generator:
        """Of one step, so that a checkpoint needs no state of it."""
        key = self.steps, ("moves", "candidates").index(use)
        (seed,) = np.random.SeedSequence(self._seeds, spawn_key=key).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(seed))

    def _watch(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Have the backward pass from y add up the gradients of candidates."""
        if y.requires_grad:
            add = functools.partial(self._add, x.detach())
            y.register_hook(lambda grad: untraced(functools.partial(add, grad)))

    def _add(self, x: torch.Tensor, grad: torch.Tensor) -> None:
        layer, c = self.layer, self.layer.connectivity
        if self._union is None or self._union[0] is not c:
            generator = self._generator("candidates")
            union, is_new = candidates(c, self.candidates, region=self.region, generator=generator)
            self._union, self._scores = (c, union, is_new), None
        _, union, is_new = self._union
        present = _weight(layer).detach()
        weight = present.new_zeros(union.nnz)
        weight[~is_new.to(weight.device)] = present
        with torch.enable_grad():
            y = _output(layer, x, weight.requires_grad_(), union)
        (found,) = torch.autograd.grad(y, weight, grad.to(y.dtype))
        self._scores = found if self._scores is None else self._scores + found


class _Hook:
    """On a layer's forward. A copy of the layer, or one from a pickle, is not rewired."""

    def __init__(self, rewirer: Rewirer | None = None) -> None:
        self.rewirer = (lambda: None) if rewirer is None else weakref.ref(rewirer)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()

    def __call__(self, layer: Any, args: tuple[Any, ...], named: dict[str, Any], y: Any) -> None:
        rewirer = self.rewirer()
        if rewirer is not None and rewirer._due:
            rewirer._watch(args[0] if args else named["x"], y)


def adopt(layer: Layer, state: Mapping[str, Any], prefix: str = "") -> None:
    """Load a state dict of a rewired layer into one that it was before: connectivity, then values.

    `load_state_dict` refuses another connectivity, as weights mean nothing without theirs. This
    takes it over, if every dendrite has as many synapses as before; in_shape and labels stay.
    Load the optimizer's state as usual.

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
    weight, c = _weight(layer), layer.connectivity
    own = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    expected = {name: list(p.shape) for name, p in layer.named_parameters()}
    got = {name: list(value.shape) for name, value in own.items() if name != "_extra_state"}
    if got != expected or "_extra_state" not in own:
        raise ValueError(f"Expected _extra_state and {expected} in the state, got {got}")
    try:
        saved = _saved_connectivity(own["_extra_state"], weight.numel())
    except KeyError as error:
        raise ValueError(f"Expected the state of a layer, got one without {error}") from error
    same_sizes = saved.in_features == c.in_features and saved.crow_indices.equal(c.crow_indices)
    if not same_sizes or not saved.soma_ptr.equal(c.soma_ptr):
        raise ValueError(f"Expected a state of this layer rewired. {difference(c, saved)}")
    image = c.in_shape, c.channels_first
    columns = saved.col_indices
    _connect(
        layer,
        Connectivity(c.crow_indices, columns, c.soma_ptr, c.in_features, *image, c.labels),
    )
    layer.load_state_dict(own)


def _connect(layer: Layer, connectivity: Connectivity) -> None:
    layer.connectivity = connectivity
    operators.index_tensors(connectivity)  # compiled code cannot mark them


def _output(
    layer: Layer, x: torch.Tensor, weight: torch.Tensor, connectivity: Connectivity
) -> torch.Tensor:
    """Of the layer with other synapses; only `weight` gets a gradient."""
    values = {name: p.detach() for name, p in layer.named_parameters()}
    if isinstance(layer, SparseLinear):
        bias = values.get("bias")
        return functional.sparse_linear(x, weight, bias, connectivity, precision=layer.precision)
    return functional.dendritic_layer(
        x,
        weight,
        values.get("dendrite_bias"),
        values["cable_weight"],
        values.get("soma_bias"),
        connectivity,
        activation=layer.activation,
        negative_slope=layer.negative_slope,
        soma_activation=layer.soma_activation,
        precision=layer.precision,
    )


def _weight(layer: Layer) -> torch.nn.Parameter:
    """Of the synapses, where it can be rewired."""
    if not isinstance(layer, (DendriticLayer, SparseLinear)):
        raise TypeError(f"Expected a DendriticLayer or SparseLinear, got {type(layer).__name__}")
    weight = layer.whole_parameters()[layer.WEIGHT]
    if type(weight.data) is not torch.Tensor:
        kind = type(weight.data).__name__
        raise TypeError(f"Expected {layer.WEIGHT} to be an ordinary tensor, got a {kind}")
    return weight


def _beside(weight: torch.nn.Parameter, optimizer: Optimizers) -> list[torch.Tensor]:
    """What has a number for each synapse: a gradient and the optimizer's state."""
    found = [] if weight.grad is None else [weight.grad]
    if optimizer is None:
        return found
    if not isinstance(optimizer, (Optimizer, StepInBackward)):
        kind = type(optimizer).__name__
        raise TypeError(f"Expected an optimizer of torch.optim or StepInBackward, got {kind}")
    each = optimizer.optimizers if isinstance(optimizer, StepInBackward) else [optimizer]
    own = [o for o in each if any(p is weight for g in o.param_groups for p in g["params"])]
    if not own:
        raise ValueError("Expected an optimizer of the layer's synapse weights, got one of others")
    for one in own:
        if isinstance(one, LBFGS):
            raise ValueError("Expected an optimizer whose state is by synapse, got LBFGS")
        found += [
            value
            for value in one.state.get(weight, {}).values()
            if isinstance(value, torch.Tensor) and value.shape == weight.shape
        ]
    return found


def _check_region(c: Connectivity, region: Connectivity | None) -> None:
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
