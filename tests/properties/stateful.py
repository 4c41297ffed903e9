"""A layer in any order of training, rewiring, pruning, saving, moving and compiling, and its twin.

The twin has a dense matrix under a mask, and an optimizer on it. Outputs and gradients are compared
with float64, and steps of the two optimizers with each other; then the twin takes the numbers of
the layer, so that errors do not grow. All else moves numbers and must keep them bit for bit.
"""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor, nn

import dendrite_kernels as dk
from dendrite_kernels import plasticity
from tests.properties import states, strategies, twins
from tests.properties.states import options_of, weight_of
from tests.properties.strategies import numbers

OPTIMIZERS: dict[str, Any] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AMSGrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
}
ROUNDINGS = 16  # more than a step of any of these has


class LayerMachine(RuleBasedStateMachine):
    """See the module. A new way to change a layer is a rule here."""

    layer: Any
    optimizer: torch.optim.Optimizer
    mask: Tensor  # bool [R, N]
    twin: dict[str, nn.Parameter]  # of the layer, the synapses as [R, N]
    twin_optimizer: torch.optim.Optimizer

    @initialize(
        c=strategies.networks(large=False),
        kind=st.sampled_from([dk.DendriticLayer, dk.SparseLinear]),
        bias=st.booleans(),
        slope=strategies.slopes,
        optimizer=st.sampled_from(sorted(OPTIMIZERS)),
        rng=strategies.generators,
    )
    def begin(
        self,
        c: dk.Connectivity,
        kind: Any,
        bias: bool,
        slope: float,
        optimizer: str,
        rng: np.random.Generator,
    ) -> None:
        self.make = OPTIMIZERS[optimizer]
        self.layer = kind(c, bias=bias, negative_slope=slope, dtype=torch.float64)
        for p in self.layer.parameters():
            p.data.copy_(numbers(rng, False, *p.shape))
        self.begin_anew(rng)

    def begin_anew(self, rng: np.random.Generator) -> None:
        """New optimizers for the layer as it is, and a first step, so that they have a state."""
        self.first = self.layer.connectivity  # until dendrites have other numbers of synapses
        self.compiled: Any = None
        self.mask = self.layer.connectivity.to_mask()
        self.optimizer = self.make(self.layer.parameters())
        self.twin = {
            name: nn.Parameter(self.placed(name, p), p.requires_grad)
            for name, p in self.layer.named_parameters()
        }
        self.twin_optimizer = self.make(self.twin.values())
        self.train((5,), rng)

    def placed(self, name: str, values: Tensor) -> Tensor:
        """As the twin has them."""
        if name != self.layer.WEIGHT or values.shape != weight_of(self.layer).shape:
            return values.detach().clone()
        matrix = values.new_zeros(self.mask.shape)
        matrix[self.mask] = values.detach()
        return matrix

    def numbers(self) -> list[tuple[str, Tensor, Tensor]]:
        """Of the layer and the twin, side by side: parameters and what optimizers keep."""
        pairs = []
        for name, p in self.layer.named_parameters():
            mine, other = self.optimizer.state[p], self.twin_optimizer.state[self.twin[name]]
            assert mine.keys() == other.keys()
            found = [(name, p.detach(), self.twin[name].detach())]
            found += [(f"{key} of {name}", mine[key], other[key]) for key in mine]
            pairs += [(label, self.placed(name, ours), theirs) for label, ours, theirs in found]
        return pairs

    # ---- what computes ----

    @rule(lead=strategies.leads, rng=strategies.generators)
    def train(self, lead: tuple[int, ...], rng: np.random.Generator) -> None:
        layer, c = self.layer, self.layer.connectivity
        somas = isinstance(layer, dk.DendriticLayer)
        weight = weight_of(layer)
        x = numbers(rng, False, *lead, c.in_features).to(weight.dtype).requires_grad_()
        grad = numbers(rng, False, *lead, c.num_somas if somas else c.num_dendrites).to(x.dtype)
        leaves = dict(layer.named_parameters())
        options = options_of(layer)
        twin = (
            twins.of_layer(c, leaves, options)
            if somas
            else twins.of_linear(c, weight, layer.bias, options)
        )
        run = layer if self.compiled is None else self.compiled
        twins.compare(lambda: run(x), x, leaves, grad, twin)
        run(x).backward(grad)
        size = {name: 1 + p.detach().abs() for name, p in self.twin.items()}
        for name, p in leaves.items():
            self.twin[name].grad = None if p.grad is None else self.placed(name, p.grad)
            if p.grad is not None:
                size[name] += self.placed(name, p.grad).abs() + self.placed(name, p.grad).square()
        for label, ours, _ in self.numbers():
            size[label.rpartition(" ")[2]] += ours.abs()
        for optimizer in (self.optimizer, self.twin_optimizer):
            optimizer.step()
            optimizer.zero_grad()
        unit = ROUNDINGS * torch.finfo(x.dtype).eps
        for label, ours, theirs in self.numbers():
            assert ((ours - theirs).abs() <= unit * size[label.rpartition(" ")[2]]).all(), label
            theirs.copy_(ours)

    # ---- what moves numbers ----

    @rule(fraction=st.sampled_from([0.0, 0.1, 0.3, 1.0]), seed=st.integers(0, 2**31))
    def rewire(self, fraction: float, seed: int) -> None:
        c, weight = self.layer.connectivity, weight_of(self.layer)
        counts = states.moving(c, ~self.mask, fraction)
        going = states.smallest(c, weight, counts)
        generator = torch.Generator().manual_seed(seed)
        plasticity.rewire(self.layer, self.optimizer, fraction=fraction, generator=generator)
        new = self.layer.connectivity.to_mask()
        kept = self.mask.masked_scatter(self.mask, ~going)
        assert (new & kept).equal(kept)
        assert (new & ~self.mask).sum(1).tolist() == counts
        self.mask = new
        own = self.twin[self.layer.WEIGHT]
        for tensor in (own.data, *self.twin_optimizer.state[own].values()):
            if tensor.shape == own.shape:
                tensor *= kept

    @rule(amount=st.sampled_from([0, 1, 0.1, 0.3]), rng=strategies.generators)
    def prune(self, amount: float, rng: np.random.Generator) -> None:
        before = self.mask.sum()
        going = states.smallest(
            self.layer.connectivity,
            weight_of(self.layer),
            [
                min(amount, k) if isinstance(amount, int) else round(amount * k)
                for k in self.mask.sum(1).tolist()
            ],
        )
        expected = self.twin[self.layer.WEIGHT].detach()[self.mask][~going]
        self.layer = self.layer.prune(amount)
        assert weight_of(self.layer).equal(expected)
        assert self.layer.connectivity.nnz == before - going.sum()
        self.begin_anew(rng)

    @rule(way=st.sampled_from(["state", "adopt", "file"]))
    def reload(self, way: str) -> None:
        """As after a restart: a new layer and a new optimizer take what was saved."""
        old, buffer = self.layer, io.BytesIO()
        torch.save([old.state_dict(), self.optimizer.state_dict()], buffer)
        buffer.seek(0)
        state, of_optimizer = torch.load(buffer, weights_only=True)
        if way == "file":
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "layer.safetensors")
                dk.save(old, path)
                self.layer = dk.load(path)
        elif way == "adopt":
            self.layer = states.like(old, self.first)
            plasticity.adopt(self.layer, state)
        else:
            self.layer = type(old).from_state_dict(state, **options_of(old))
        if way != "file":  # a state dict does not say what is frozen
            for name, p in old.named_parameters():
                self.layer.get_parameter(name).requires_grad_(p.requires_grad)
        self.optimizer = self.make(self.layer.parameters())
        self.optimizer.load_state_dict(of_optimizer)
        self.compiled = None

    @rule(way=st.sampled_from([copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))]))
    def copied(self, way: Any) -> None:
        self.layer, self.optimizer = way((self.layer, self.optimizer))
        self.compiled = None

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def move(self, dtype: torch.dtype) -> None:
        self.layer.to(dtype)
        for p in self.twin.values():
            p.data = p.data.to(dtype)
        for optimizer in (self.optimizer, self.twin_optimizer):
            optimizer.load_state_dict(optimizer.state_dict())  # to the dtype of the parameters

    @rule(which=st.integers(0, 3))
    def freeze(self, which: int) -> None:
        """Or thaw."""
        names = sorted(self.twin)
        name = names[which % len(names)]
        for p in (self.layer.get_parameter(name), self.twin[name]):
            p.requires_grad_(not p.requires_grad)

    @rule(really=st.sampled_from([False] * 9 + [True]))
    def compile(self, really: bool) -> None:
        """Later steps run what was compiled, also after synapses have moved."""
        if really:
            self.compiled = torch.compile(self.layer, backend="eager")

    def teardown(self) -> None:
        torch.compiler.reset()

    @invariant()
    def is_its_twin(self) -> None:
        assert self.layer.connectivity.to_mask().equal(self.mask)
        for label, ours, theirs in self.numbers():
            assert ours.dtype == theirs.dtype, label
            assert ours.equal(theirs), label
        for name, p in self.layer.named_parameters():
            assert p.requires_grad == self.twin[name].requires_grad, name
