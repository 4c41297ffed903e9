"""DDP and FSDP2 over NCCL: as on one process, to float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.nn import test_distributed

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_nccl_available()), reason="torch without NCCL"
)


@pytest.mark.parametrize("world", [1, 2])
def test_ddp_and_fsdp_equal_one_process(world: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, got {torch.cuda.device_count()}")
    test_distributed.launch(world, tmp_path, test_distributed.data_parallel, device="cuda")
