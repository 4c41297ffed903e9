"""Lightning, skorch, averaged models and averages over state dicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

import dendrite_kernels as dk
from tests.tools.small import assert_trained_alike, batches, network

pytestmark = pytest.mark.tools


@pytest.mark.filterwarnings("ignore")
def test_lightning_fits_resumes_and_loads(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Net(lightning.LightningModule):
        def __init__(self, connectivity: dk.Connectivity, lr: float = 0.01) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.body = nn.Sequential(dk.DendriticLayer(connectivity), nn.Linear(16, 10))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.body(x)
            return y

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)

    def trainer(epochs: int) -> Any:
        return lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
        )  # fmt: skip

    fields = dk.connectivity.local_receptive_fields((8, 8), 16, 4, 8, seed=0)
    data = DataLoader(batches(3), batch_size=None)  # type: ignore[arg-type]
    path = tmp_path / "model.ckpt"
    torch.manual_seed(0)
    model = Net(fields)
    first = trainer(2)
    first.fit(model, data)
    first.save_checkpoint(path)
    back = Net.load_from_checkpoint(path)  # weights_only, with a Connectivity in its hparams
    assert back.hparams.connectivity == fields
    assert back.hparams.connectivity.in_shape == (8, 8)
    assert_trained_alike(back, model)
    resumed = Net(fields)
    trainer(4).fit(resumed, data, ckpt_path=path)
    whole = Net.load_from_checkpoint(path)
    optimizer = torch.optim.Adam(whole.parameters(), lr=0.01)
    optimizer.load_state_dict(first.optimizers[0].state_dict())
    for _ in range(2):
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(whole(x), y).backward()
            optimizer.step()
    assert_trained_alike(resumed, whole)
    x, _ = batches(1)[0]
    traced = model.to_torchscript(method="trace", example_inputs=x)
    x = torch.randn(5, 64)
    assert torch.equal(traced(x), model(x))


def test_skorch_saves_and_loads(tmp_path: Path) -> None:
    skorch = pytest.importorskip("skorch")
    ((x, y),) = batches(1, batch=96)

    def net(seed: int) -> Any:
        return skorch.NeuralNetClassifier(
            network(seed), criterion=nn.CrossEntropyLoss, max_epochs=2, verbose=0, lr=0.1
        )

    fitted, other = net(0).fit(x, y), net(1).initialize()
    for safe in (False, True):
        fitted.save_params(f_params=tmp_path / "params", use_safetensors=safe)
        other.load_params(f_params=tmp_path / "params", use_safetensors=safe)
        assert (other.predict(x) == fitted.predict(x)).all()


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("multi", [None, get_ema_multi_avg_fn(0.9)])
def test_averaged_model(use_buffers: bool, multi: Any, tmp_path: Path) -> None:
    model = network(0)
    averaged = AveragedModel(model, multi_avg_fn=multi, use_buffers=use_buffers)
    for seed in (1, 2):
        averaged.update_parameters(network(seed))
    torch.save(averaged.state_dict(), tmp_path / "state")
    other = AveragedModel(network(3), multi_avg_fn=multi, use_buffers=use_buffers)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert_trained_alike(other, averaged)


def test_federated_averaging_over_state_dicts() -> None:
    states = [{k: v.cpu() for k, v in network(seed).state_dict().items()} for seed in (0, 1, 2)]
    mean = {k: torch.stack([s[k].float() for s in states]).mean(0) for k in states[0]}
    model = network(3)
    model.load_state_dict(mean)
    parameters = [dict(network(seed).named_parameters()) for seed in (0, 1, 2)]
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, sum(p[name] for p in parameters) / 3)


def test_hand_written_average_over_a_state_dict() -> None:
    """A new tensor for each key. In place, integers cannot hold the product: torch says so, as for
    the batch count of BatchNorm.
    """
    average = network(0).state_dict()
    for seed in range(1, 200):
        for name, value in network(seed % 3).state_dict().items():
            average[name] = 0.99 * average[name] + 0.01 * value
    model = network(5)
    model.load_state_dict(average)
    assert model(torch.randn(2, 64)).isfinite().all()
    with pytest.raises(RuntimeError, match="can't be cast to the desired output type Byte"):
        average["0._extra_state"].to(torch.uint8).mul_(0.5)


def test_functional_call_takes_the_state_dict() -> None:
    model, x = network(0), torch.randn(3, 64)
    state = network(1).state_dict()
    assert torch.equal(torch.func.functional_call(model, state, (x,)), network(1)(x))


def test_tensorboard_draws_the_graph(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    model = network(0)
    model(torch.randn(2, 64))
    with SummaryWriter(tmp_path) as writer:
        writer.add_graph(model, torch.randn(2, 64))
    assert list(tmp_path.iterdir())
