"""Growing dendrites in training: adding them, what candidates are trained by, freezing them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from . import operators
from ._combine import new_rows
from ._pattern import synapses_of
from ._rewire import Optimizers, connect, frozen, numbers_of, trainers, weight_of, wholly
from ._validate import Array, integers
from .nn import DendriticLayer
from .structure import Connectivity


@torch.inference_mode(False)  # tensors made in that mode could never train
@torch.no_grad()
def grow(
    layer: DendriticLayer,
    optimizer: Optimizers,
    new: Connectivity,
    *,
    cable: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Add dendrites to a layer in training, at the end of each soma.

    Their synapse weights are drawn as those of a layer on `new` with the same options, biases are
    0, cable weights `cable`. With 0 the layer computes what it did before: bit for bit in the C++
    and Numba kernels, else within rounding. Cables alone have a gradient then; after one step
    synapses have, too.

    Weights, biases, cables, gradients and the optimizer's numbers of old dendrites move bit for
    bit; those numbers and gradients are 0 for new ones. `layer.connectivity` becomes
    `layer.connectivity.grow(new)`. Parameters stay the same objects, of another size, so that
    optimizers, schedulers and hooks keep them. Grow between a step and the next forward.

    Data-parallel processes must grow alike: the same `new`, and generators of one seed. Wrap the
    model in DistributedDataParallel anew, since one that is there misses the gradients of what has
    changed its size.

    Args:
        layer: not a shard, parametrized, pruned or on the meta device. No other layer may share
            its parameters.
        optimizer: of torch.optim, or a StepInBackward, which trains all its parameters that need
            gradients; None: one without state does.
        new: dendrites on the same inputs for the same somas, which may have none or several each.
        cable: their cable weights.
        generator: of torch, on the CPU; None: torch's own.

    Returns:
        The numbers of the new dendrites, int64 [new.num_dendrites], in the order of `new`.

    Raises:
        TypeError, ValueError: an argument does not fit, or the optimizer holds what cannot grow
            (LBFGS). Nothing is changed then.

    Source: docs/growth.md; Fahlman & Lebiere, The cascade-correlation learning architecture,
    NIPS 2 (1989).
    """
    weight = _weight_of(layer)
    if not math.isfinite(cable):
        raise ValueError(f"Expected a finite cable weight, got {cable}")
    c = layer.connectivity
    grown = c.grow(new)
    names = [layer.WEIGHT, "dendrite_bias", "cable_weight"]
    trained = _trained(layer, optimizer, names)
    drawn = nn.Parameter(torch.empty(new.nnz, dtype=weight.dtype, device="cpu"))
    layer._draw_synapses(drawn, new, generator)
    rows = new_rows(c, new)
    is_new = np.zeros(grown.num_dendrites, np.bool_)
    is_new[rows] = True
    synapses = is_new.repeat(np.diff(grown.crow_indices.numpy()))
    values: list[torch.Tensor | float] = [drawn.detach(), 0.0, cable]
    parameters, states = [], []
    for name, where, value in zip(names, (synapses, is_new, is_new), values, strict=True):
        if name not in trained:
            continue
        p = layer.get_parameter(name)
        grad = None if p.grad is None else _widened(p.grad, where)
        parameters.append((p, _widened(p, where, value), grad))
        for state, key in numbers_of(p, trained[name]):
            states.append((state, key, _widened(state[key], where)))

    def write() -> None:
        for resized in parameters:
            _resize(*resized)
        for state, key, wide in states:
            state[key] = wide
        connect(layer, grown)

    wholly(write)
    return torch.from_numpy(rows)


def correlation(
    a: torch.Tensor, err: torch.Tensor, connectivity: Connectivity
) -> torch.Tensor:  # [B, R], [B, S] -> [R]
    """How well each dendrite follows the error of its soma: |correlation over the batch|.

        score[r] = |sum_b a'[b,r] e'[b,s]| / (|a'[:,r]| |e'[:,s]|),   s the soma of r

    where a' and e' are less their means over the batch. Differentiable in both; 0, with gradient
    0, where one does not vary. Train candidates by maximising its sum.

    Args:
        a: [B, R] what the dendrites send, say `layer.dendrites(x)`.
        err: [B, S] the gradient of the loss at the sums v of somas, or any other error.
        connectivity: R dendrites in S somas, say the one that a layer grew by.

    Returns:
        [R], from 0 to 1; of low precision in float32.

    Raises:
        TypeError, ValueError: other shapes.

    Source: docs/growth.md; after Fahlman & Lebiere (1989), who maximise the covariance,
    `score * a.std(0, correction=0)` in units of the error's deviation.
    """
    if not isinstance(connectivity, Connectivity):
        raise TypeError(f"Expected a Connectivity, got {type(connectivity).__name__}")
    sizes = connectivity.num_dendrites, connectivity.num_somas
    if not (isinstance(a, torch.Tensor) and isinstance(err, torch.Tensor)):
        raise TypeError(f"Expected tensors, got {type(a).__name__} and {type(err).__name__}")
    if a.dim() != 2 or err.dim() != 2 or len(a) != len(err) or (a.shape[1], err.shape[1]) != sizes:
        raise ValueError(
            f"Expected a [B, {sizes[0]}] and err [B, {sizes[1]}], "
            f"got {list(a.shape)} and {list(err.shape)}"
        )
    owned = operators.beside(err, connectivity.soma_ptr).to(err.device).long().diff()
    err = _standard(err).repeat_interleave(owned, dim=1, output_size=sizes[0])
    return (_standard(a) * err).sum(0).abs()


def freeze(
    layer: DendriticLayer,
    optimizer: Optimizers,
    rows: Sequence[int] | Array | torch.Tensor,
    *,
    cable: bool = False,
) -> Frozen:
    """Keep the synapse weights and biases of some dendrites as they are, bit for bit.

    Their gradients become 0, and what an optimizer changes nevertheless, by momentum or weight
    decay, is put back after its step. The dendrites stay frozen when the layer grows, and rewiring
    leaves them alone. Copies of the layer, and layers from a file, are not frozen.

    Args:
        layer: see `grow`.
        optimizer: see `grow`; None: one without momentum or weight decay trains the layer.
        rows: the numbers of the dendrites, say what `grow` returned.
        cable: whether to freeze their cable weights, too.

    Returns:
        A handle: `remove()` lets them train again, `rows` are their numbers now.

    Raises:
        TypeError, ValueError: an argument does not fit. Nothing is changed then.
    """
    _weight_of(layer)
    chosen, c = integers("rows", rows).astype(np.int64), layer.connectivity
    if chosen.size and not 0 <= chosen.min() <= chosen.max() < c.num_dendrites:
        raise ValueError(
            f"Expected rows from 0 to {c.num_dendrites - 1}, got {chosen.min()} to {chosen.max()}"
        )
    names = [layer.WEIGHT, "dendrite_bias", *(["cable_weight"] if cable else [])]
    return Frozen(layer, chosen, _trained(layer, optimizer, names))


class Frozen:
    """Dendrites that do not train: what `freeze` returns."""

    def __init__(
        self, layer: DendriticLayer, rows: Array, trained: dict[str, list[Optimizer]]
    ) -> None:
        """`trained`: the parameters to keep, and who trains them."""
        pointer = layer.connectivity.soma_ptr.numpy()
        self._layer = layer
        self._somas = np.searchsorted(pointer, rows, side="right") - 1
        self._places = rows - pointer[self._somas]  # growth leaves a dendrite its place in the soma
        self._of: Connectivity | None = None
        self._index: dict[str, torch.Tensor] = {}
        self._before: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._handles: list[Any] = []
        frozen.setdefault(layer, WeakSet()).add(self)
        for name in trained:
            parameter = layer.get_parameter(name)
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._masks(name)))
        for one in {id(one): one for own in trained.values() for one in own}.values():
            own = [name for name, each in trained.items() if one in each]
            self._handles.append(one.register_step_pre_hook(lambda *_, own=own: self._keep(own)))
            self._handles.append(one.register_step_post_hook(lambda *_: self._put_back()))

    @property
    def rows(self) -> torch.Tensor:
        """The numbers of the frozen dendrites, int64."""
        pointer = self._layer.connectivity.soma_ptr.numpy()
        return torch.from_numpy(pointer[self._somas] + self._places)

    def remove(self) -> None:
        """Let them train again."""
        frozen[self._layer].discard(self)
        for handle in self._handles:
            handle.remove()

    def _numbers(self, name: str) -> torch.Tensor:
        """Which numbers of a parameter are theirs."""
        c = self._layer.connectivity
        if self._of is not c:
            crow, rows = c.crow_indices.numpy(), self.rows
            self._of, self._index = c, dict.fromkeys(self._layer.PARAMETERS, rows)
            self._index[self._layer.WEIGHT] = torch.from_numpy(synapses_of(crow, rows.numpy()))
        return self._index[name]

    def _masks(self, name: str) -> Any:
        return lambda grad: grad.index_fill(0, self._numbers(name).to(grad.device), 0)

    @torch.no_grad()
    def _keep(self, names: Sequence[str]) -> None:
        self._before = []
        for name in names:
            parameter = self._layer.get_parameter(name)
            index = self._numbers(name).to(parameter.device)
            self._before.append((parameter, index, parameter[index]))

    @torch.no_grad()
    def _put_back(self) -> None:
        for parameter, index, values in self._before:
            parameter[index] = values
        self._before = []


def _weight_of(layer: DendriticLayer) -> nn.Parameter:
    """Of the synapses of a layer that has somas."""
    if not isinstance(layer, DendriticLayer):
        raise TypeError(f"Expected a DendriticLayer, got {type(layer).__name__}")
    return weight_of(layer)


def _trained(
    layer: DendriticLayer, optimizer: Optimizers, names: Sequence[str]
) -> dict[str, list[Optimizer]]:
    """Which optimizers train each parameter that there is; none need train what takes no gradient.

    Raises:
        TypeError, ValueError: as `trainers`.
    """
    found: dict[str, list[Optimizer]] = {}
    for name in names:
        parameter = getattr(layer, name)
        if parameter is None:
            continue
        try:
            found[name] = trainers(parameter, optimizer, name)
        except ValueError:
            if parameter.requires_grad:
                raise
            found[name] = []
    return found


def _widened(old: torch.Tensor, is_new: Array, values: torch.Tensor | float = 0.0) -> torch.Tensor:
    """[old.numel()] -> [is_new.size]: `old` in order, and the values where `is_new`."""
    where = torch.from_numpy(is_new).to(old.device)
    wide = old.new_empty(is_new.size)
    wide[~where] = old.detach()
    wide[where] = values.to(wide) if isinstance(values, torch.Tensor) else values
    return wide


def _resize(parameter: nn.Parameter, value: torch.Tensor, grad: torch.Tensor | None) -> None:
    """Another size for the same object. What backward kept of the old one must not be used."""
    parameter.grad = None
    other = torch.float32 if parameter.dtype is torch.float64 else torch.float64
    # Of another dtype, so that autograd forgets the node that accumulates gradients of the old
    # size. A loss that is still alive would keep it.
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = value
    torch.autograd.graph.increment_version(parameter)  # backward of an old loss refuses the change
    parameter.grad = grad


def _standard(values: torch.Tensor) -> torch.Tensor:
    """[B, n] less the means, and over the norms, of columns; 0 where a column is constant."""
    if values.dtype in operators.LOW:
        values = values.float()
    less = values - values.mean(0)
    norm = less.norm(dim=0)
    varies = norm > 8 * torch.finfo(values.dtype).eps * values.norm(dim=0)
    return torch.where(varies, less / torch.where(varies, norm, 1), 0)
