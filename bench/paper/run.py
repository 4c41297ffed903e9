"""One training of the article: which network, which data, which protocol.

Source: Chavlis & Poirazi (2025), Methods; docs/equations.md, sections 4 to 8.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from math import inf
from typing import Any, Literal, get_args

import torch
from torch import nn

import dendrite_kernels as dk
from bench.paper.datasets import ImageData
from dendrite_kernels.benchmark.masked_dense import masked_dense_twin
from dendrite_kernels.nn import Init

Task = Literal["shuffled", "sequential"]

EPOCHS = {"mnist": 15, "fmnist": 25, "kmnist": 25, "emnist": 50, "cifar10": 50}  # as published
OTHER_EPOCHS = 25

# Fields that tables of earlier versions lack: left out of the key where they are these, so that the
# same training has the same key.
_LATER = {"init": "paper"}
_LEAST = dict.fromkeys(
    ("dendrites", "somas", "synapses", "layers", "epochs", "batch", "patience"), 1
) | {"trial": 0}


@dataclass(frozen=True)
class Run:
    """Everything that decides the result of a training, and nothing else.

    data: name of the data set.
    kind, somas, dendrites, synapses, layers, dropout: arguments of `dk.models.build`.
    trial: seed of masks, weights, split, noise and batches.
    noise: standard deviation of the noise that is added to all images once; they are in 0..1.
    task: "sequential" shows the classes one after the other, in every epoch.
    epochs: None: those of the article for this data set, twice as many for the sequential task.
    patience: stop after so many epochs without a lower validation loss, and take the weights of
        the best one; None: never, and take the last ones.
    twin: train the masked-dense twin of the network instead.
    init: of the weights: "paper" by the sizes of the dense matrices, "fan_in" by the synapses.
    """

    data: str
    kind: dk.models.Kind
    dendrites: int
    somas: int
    synapses: int = 16
    layers: int = 1
    trial: int = 0
    noise: float = 0.0
    task: Task = "shuffled"
    epochs: int | None = None
    batch: int = 128
    lr: float = 1e-3
    dropout: float = 0.0
    patience: int | None = None
    twin: bool = False
    init: Init = "paper"

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise ValueError(f"Expected a task of {list(get_args(Task))}, got {self.task!r}")
        if self.init not in get_args(Init):
            raise ValueError(f"Expected an init of {list(get_args(Init))}, got {self.init!r}")
        if self.epochs is None:
            known = "emnist" if self.data.startswith("emnist-") else self.data
            epochs = EPOCHS.get(known, OTHER_EPOCHS)
            object.__setattr__(self, "epochs", epochs * (2 if self.task == "sequential" else 1))
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if name == "patience" and value is None:
                continue
            if not isinstance(value, int) or value < least:
                raise ValueError(f"Expected {name} >= {least}, got {value!r}")
        if not 0 <= self.noise < inf:
            raise ValueError(f"Expected finite noise >= 0, got {self.noise}")
        object.__setattr__(self, "noise", self.noise + 0.0)  # -0.0 becomes 0.0: one key
        if not 0 < self.lr < inf:
            raise ValueError(f"Expected a finite lr > 0, got {self.lr}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Expected 0 <= dropout < 1, got {self.dropout}")

    @property
    def key(self) -> str:
        """The run as JSON, the same for equal runs."""
        values = dict(item for item in asdict(self).items() if item not in _LATER.items())
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def from_key(cls, key: str) -> Run:
        """The run with this key; ValueError for other text."""
        try:
            given: dict[str, Any] = json.loads(key)
            missing = {field.name for field in fields(cls)} ^ set(_LATER | given)
            if missing:
                raise ValueError(f"fields that differ: {sorted(missing)}")
            return cls(**given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Expected the key of a run, got {key!r}: {error}") from error

    def build(self, data: ImageData) -> nn.Sequential:
        """The network before training."""
        torch.manual_seed(self.trial)
        model = dk.models.build(
            self.kind,
            data.in_shape,
            self.somas,
            self.dendrites,
            self.synapses,
            data.classes,
            channels=data.channels,
            layers=self.layers,
            seed=self.trial,
            init=self.init,
            dropout=self.dropout,
        )
        return masked_dense_twin(model) if self.twin else model
