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
import operator
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn, get_args

import numpy as np
import torch
import torch.distributed as dist

from . import functional, transforms
from ._new_dendrites import Frozen, correlation, freeze, grow
from ._rewire import (
    Layer,
    Optimizers,
    adopt,
    beside,
    candidates,
    check_fraction,
    check_region,
    rewire,
    weight_of,
)
from ._validate import check_size
from .nn import SparseLinear
from .structure import Connectivity, untraced

__all__ = [
    "Frozen",
    "Rewirer",
    "adopt",
    "candidates",
    "correlation",
    "freeze",
    "grow",
    "rewire",
]

Rule = Literal["set", "rigl"]


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
        beside(weight_of(layer), optimizer)
        check_region(layer.connectivity, region)
        if rule not in get_args(Rule):
            raise ValueError(f"Expected rule of {sorted(get_args(Rule))}, got {rule!r}")
        check_fraction(fraction)
        if candidates is None:
            candidates = int(layer.connectivity.crow_indices.diff().max()) or 1
        self.layer, self.optimizer, self.rule = layer, optimizer, rule
        self.every, self.end = check_size("every", every), check_size("end", end)
        self.fraction, self.region = fraction, region
        self.candidates = check_size("candidates", candidates)
        self._seeds = np.random.SeedSequence(operator.index(seed)).entropy  # ValueError below 0
        self.steps = 0
        self._due = self._is_due()  # a flag: compiled code would look at `steps` at each step
        self._union: tuple[Connectivity, Connectivity, torch.Tensor] | None = None
        self._scores: torch.Tensor | None = None  # [union.nnz]
        self._handle = None
        if rule == "rigl":
            self._handle = layer.register_forward_hook(_Hook(self), with_kwargs=True)

    def remove(self) -> None:
        """Take the hook off the layer: nothing is rewired any more."""
        self._due, self.end = False, 0
        if self._handle is not None:
            self._handle.remove()

    def __getstate__(self) -> NoReturn:
        raise TypeError("Expected no copy of a Rewirer: make another, and load its state_dict")

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

    def _watch(self, x: torch.Tensor, y: torch.Tensor, options: dict[str, Any]) -> None:
        """Have the backward pass from y add up the gradients of candidates."""
        if transforms.active():
            raise RuntimeError(
                "Expected no transform of torch.func in a step that rewires by 'rigl', got one"
            )
        if y.requires_grad:
            kind = x.device.type  # backward runs outside of autocast
            cast = torch.autocast(
                kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
            )
            values = {name: p.detach() for name, p in self.layer.named_parameters()}
            again = functools.partial(_output, self.layer, x.detach(), values, options)
            add = functools.partial(self._add, again, values[self.layer.WEIGHT], cast)
            y.register_hook(lambda grad: untraced(functools.partial(add, grad)))

    def _add(
        self,
        again: Callable[[torch.Tensor, Connectivity], torch.Tensor],
        present: torch.Tensor,
        cast: torch.autocast,
        grad: torch.Tensor,
    ) -> None:
        """`again`: the call of the layer, of other synapses; `present`: its weights in it."""
        c = self.layer.connectivity
        if self._union is None or self._union[0] is not c:
            generator = self._generator("candidates")
            union, is_new = candidates(c, self.candidates, region=self.region, generator=generator)
            self._union, self._scores = (c, union, is_new), None
        _, union, is_new = self._union
        weight = present.new_zeros(union.nnz)
        weight[~is_new.to(weight.device)] = present
        with torch.enable_grad(), cast:
            y = again(weight.requires_grad_(), union)
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
            x = args[0] if args else named["x"]
            gate = args[1] if len(args) > 1 else named.get("gate")
            rewirer._watch(x, y, {} if gate is None else {"gate": gate.detach()})


def _output(
    layer: Layer,
    x: torch.Tensor,
    values: dict[str, torch.Tensor],  # of its parameters
    options: dict[str, Any],  # of its call
    weight: torch.Tensor,
    connectivity: Connectivity,
) -> torch.Tensor:
    """Of the layer with other synapses; only `weight` gets a gradient."""
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
        **options,
    )
