"""safetensors, accelerate, Hub and Trainer take our layers as they take nn.Linear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dendrite_kernels as dk
from tests.tools.small import assert_trained_alike, batches, network

pytestmark = pytest.mark.tools


def test_safetensors(tmp_path: Path) -> None:
    tools = pytest.importorskip("safetensors.torch")
    model, path = network(0), tmp_path / "model.safetensors"
    tools.save_file(model.state_dict(), path)
    twin = network(1)
    twin.load_state_dict(tools.load_file(path))
    assert_trained_alike(twin, model)
    tools.save_model(model, path)
    twin = network(1)
    tools.load_model(twin, path)
    assert_trained_alike(twin, model)


def train(accelerator: Any, model: Any, optimizer: Any, steps: int) -> None:
    for x, y in batches(steps):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()


def test_accelerate_saves_and_resumes(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = network(0)
    prepared = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.01))
    train(accelerator, *prepared, 3)
    accelerator.save_state(str(tmp_path / "state"))  # safe serialisation is its default
    assert list((tmp_path / "state").glob("*.safetensors"))
    train(accelerator, *prepared, 3)

    resumed = accelerate.Accelerator(cpu=True)
    twin = network(1)
    other = resumed.prepare(twin, torch.optim.Adam(twin.parameters(), lr=0.01))
    resumed.load_state(str(tmp_path / "state"))
    train(resumed, *other, 3)
    assert_trained_alike(twin, model)


def test_accelerate_offloads_to_disk(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, x = network(0), torch.randn(4, 64)
    expected = model(x)
    for offload, options in (
        (accelerate.cpu_offload, {}),
        (accelerate.disk_offload, {"offload_dir": str(tmp_path / "offload")}),
    ):
        moved = offload(network(0), execution_device="cpu", **options)
        assert torch.equal(moved(x), expected)


def test_accelerate_loads_and_dispatches(tmp_path: Path) -> None:
    """With a device map, load and dispatch in two steps: accelerate's shortcut looks for every key
    among parameters and buffers, and refuses the extra state of any module.
    """
    accelerate = pytest.importorskip("accelerate")
    tools = pytest.importorskip("safetensors.torch")
    model, path, x = network(0), tmp_path / "model.safetensors", torch.randn(4, 64)
    tools.save_file(model.state_dict(), path, metadata={"format": "pt"})
    twin = accelerate.load_checkpoint_and_dispatch(network(1), str(path))
    assert torch.equal(twin(x), model(x))
    twin = network(1)
    accelerate.load_checkpoint_in_model(twin, str(path))
    twin = accelerate.dispatch_model(twin, {"": "cpu"})
    assert torch.equal(twin(x), model(x))
    with pytest.raises(ValueError, match="_extra_state"):
        accelerate.load_checkpoint_and_dispatch(network(1), str(path), device_map={"": "cpu"})


def test_hub_mixin(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")

    class Net(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self, seed: int = 0) -> None:
            super().__init__()
            self.body = network(seed)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.body(x)
            return y

    model = Net()
    nn.init.normal_(model.body[0].synapse_weight)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert_trained_alike(Net.from_pretrained(tmp_path).body, model.body)


def test_trainer_checkpoints_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    class Net(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.body = network(seed)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.body(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    (x, y), *_ = batches(1, batch=48)
    data = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]

    def trainer(model: nn.Module, steps: int) -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_steps=3, report_to=[], use_cpu=True,
            per_device_train_batch_size=8, disable_tqdm=True, logging_strategy="no",
            learning_rate=0.01, lr_scheduler_type="constant", dataloader_pin_memory=False,
        )  # fmt: skip
        return transformers.Trainer(model, arguments, train_dataset=data)

    whole, resumed = Net(0), Net(1)
    trainer(whole, 6).train()
    assert list((tmp_path / "checkpoint-3").glob("*.safetensors"))
    trainer(resumed, 6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_trained_alike(resumed.body, whole.body)


def test_a_checkpoint_of_another_structure_is_refused(tmp_path: Path) -> None:
    tools = pytest.importorskip("safetensors.torch")
    tools.save_file(network(0).state_dict(), tmp_path / "model.safetensors")
    other = nn.Sequential(
        dk.DendriticLayer(dk.connectivity.random(64, 16, 4, 8, constant_fan_in=True, seed=5)),
        nn.Linear(16, 10),
    )
    with pytest.raises(RuntimeError, match=r"Expected dendrite 0 on inputs"):
        tools.load_model(other, tmp_path / "model.safetensors", strict=False)
