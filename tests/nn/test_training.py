"""Training: step by step equal to the masked-dense form of the same network; and it learns."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dendrite_kernels as dk
from tests import oracle

MNIST_MINI = Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist_mini.npz"
STEPS, BATCH, CLASSES = 50, 33, 5  # a batch that fills no tile


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Steps of microseconds: two threads would wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class MaskedDense(nn.Module):
    """The same network as the paper's code has it: whole matrices, zero outside their masks, whose
    gradients are masked before the optimizer sees them.
    """

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.linears = nn.ModuleList()
        self.masks: list[Tensor] = []
        for layer in list(model)[:-1]:
            assert isinstance(layer, dk.DendriticLayer)
            dendrite, dendrite_mask, soma, soma_mask = dk.interop.to_masked_dense(layer)
            for linear, mask in ((dendrite, dendrite_mask), (soma, soma_mask)):
                linear.weight.register_hook(lambda grad, mask=mask: grad * mask)
                self.linears.append(linear)
                self.masks.append(mask)
        self.output = copy.deepcopy(model[-1])

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            assert isinstance(linear, nn.Linear)
            x = F.leaky_relu(F.linear(x, linear.weight, linear.bias), 0.1)
        logits: Tensor = self.output(x)
        return logits

    def weights_outside_masks(self) -> list[Tensor]:
        return [
            p.detach()[~mask]
            for linear, mask in zip(self.linears, self.masks, strict=True)
            if isinstance(p := linear.weight, Tensor)
        ]

    def numbers(self) -> Tensor:
        """Every parameter inside the masks, in the order of the sparse model's."""
        parts: list[Tensor] = []
        for linear, mask in zip(self.linears, self.masks, strict=True):
            assert isinstance(linear, nn.Linear)
            parts += [linear.weight[mask], linear.bias]
        parts += [p.flatten() for p in self.output.parameters()]
        return torch.cat(parts).detach()


def numbers(model: nn.Sequential) -> Tensor:
    return torch.cat([p.flatten() for p in model.parameters()]).detach()


def train(model: nn.Module, x: Tensor, y: Tensor, lr: float = 1e-3) -> list[float]:
    """Adam steps, one for each of x [steps, B, N] and y [steps, B]; the loss of each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    for batch, labels in zip(x, y, strict=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["dANN-R", "dANN-LRF"])
@pytest.mark.parametrize(
    ("dtype", "layers", "tolerance"),
    [
        (torch.float64, 1, 1e-9),
        (torch.float64, 2, 1e-8),
        (torch.float32, 1, 2e-4),
        (torch.float32, 2, 1e-2),
    ],
    ids=["f64-1", "f64-2", "f32-1", "f32-2"],
)
def test_fifty_adam_steps_equal_the_masked_dense_twin(
    backend: str, kind: str, dtype: torch.dtype, layers: int, tolerance: float
) -> None:
    model = dk.models.build(kind, (12, 12), 20, 4, 16, CLASSES, layers=layers, seed=1).to(dtype)
    twin = MaskedDense(model)
    start = numbers(model)
    assert torch.equal(start, twin.numbers())

    x = torch.rand(STEPS, BATCH, 144, dtype=dtype) * (torch.rand(STEPS, BATCH, 144) < 0.6)
    y = torch.randint(CLASSES, (STEPS, BATCH))
    losses, twin_losses = train(model, x, y), train(twin, x, y)

    assert oracle.relative_error(numbers(model), twin.numbers()) <= tolerance
    assert losses == pytest.approx(twin_losses, rel=10 * tolerance)
    assert oracle.relative_error(numbers(model), start) > 0.05  # it moved, and by more than errors
    assert all(not w.any() for w in twin.weights_outside_masks())


@pytest.mark.parametrize("kind", ["dANN-R", "dANN-LRF"])
def test_a_small_problem_is_learnt(backend: str, kind: str) -> None:
    """Noisy copies of five random images."""
    images = torch.rand(CLASSES, 64)
    y = torch.randint(CLASSES, (120, 32))
    x = images[y] + 0.2 * torch.randn(120, 32, 64)
    model = dk.models.build(kind, (8, 8), 20, 4, 12, CLASSES, seed=1, init="fan_in")
    losses = train(model, x, y, lr=0.01)
    assert np.mean(losses[:5]) > 1.4
    assert np.mean(losses[-5:]) < 0.05


@pytest.mark.realdata
@pytest.mark.skipif(
    not MNIST_MINI.is_file(), reason="no ../shared/data/mnist_mini.npz beside the checkout"
)
@pytest.mark.parametrize("init", ["paper", "fan_in"])
@pytest.mark.parametrize("kind", ["dANN-R", "dANN-LRF", "dANN-GRF"])
def test_training_on_mnist_lowers_the_loss(backend: str, kind: str, init: dk.nn.Init) -> None:
    with np.load(MNIST_MINI) as data:
        x, x_test = (
            torch.from_numpy(data[name].reshape(-1, 784) / np.float32(255))
            for name in ("x_train", "x_test")
        )
        y, y_test = (
            torch.from_numpy(data[name].astype(np.int64)) for name in ("y_train", "y_test")
        )
    model = dk.models.build(kind, (28, 28), 32, 8, 16, 10, seed=0, init=init)
    with torch.no_grad():
        before = F.cross_entropy(model(x_test), y_test).item()
    assert before == pytest.approx(np.log(10), abs=0.6)
    order = torch.cat([torch.randperm(len(x))[:1920] for _ in range(4)]).reshape(-1, 128)
    train(model, x[order], y[order], lr=0.01)
    with torch.no_grad():
        logits = model(x_test)
    after = F.cross_entropy(logits, y_test).item()
    accuracy = (logits.argmax(1) == y_test).double().mean().item()
    assert after < 1.2
    assert accuracy > 0.6
