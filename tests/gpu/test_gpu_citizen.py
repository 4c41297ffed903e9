"""What works on the CPU works on a GPU: the same tests, with CUDA as torch's default device.

A layer there is as ordinary to torch as one on the CPU: compiled, exported, transformed, saved,
optimised. Left out are tests of processes, of files and of what is the same on every device.
"""

# ruff: noqa: F401

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dendrite_kernels as dk
from tests.autograd.test_torch_transforms import (
    case,
    kind,
    test_compiled_transforms_are_exact,
    test_ensemble_of_modules,
    test_forward_mode,
    test_gradgradcheck,
    test_gradgradcheck_without_gradient_of_x,
    test_gradient_penalty_trains,
    test_recorded_gradients_equal_plain_ones,
    test_third_order,
    test_transforms_are_exact,
    test_transforms_of_other_activations,
)
from tests.nn.test_interop import (
    test_any_ownership_gives_the_same_function,
    test_gradients_are_those_of_the_masked_layers,
    test_nothing_is_shared,
    test_round_trip_of_a_layer_is_exact,
    test_round_trip_of_masked_layers_is_exact,
    test_two_layers_of_a_model_there_and_back,
)
from tests.nn.test_nn import (
    assert_same,
    test_deepcopy_shares_the_connectivity_only,
    test_double_and_float,
    test_forward_is_the_function_of_the_parameters,
    test_from_meta_to_memory,
    test_frozen,
    test_pickle,
)
from tests.nn.test_state import (
    test_state_of_a_model_through_a_file,
    test_state_round_trip,
    test_state_round_trip_through_a_file,
)
from tests.nn.test_torch_optim import (
    layer,
    test_an_overwritten_saved_tensor_is_an_error,
    test_deterministic_algorithms_change_nothing,
    test_gradient_accumulation,
    test_gradient_checkpointing,
    test_lbfgs,
    test_optimizers_match_the_masked_dense_twin,
    test_parametrizations,
    test_requires_grad_freezes,
    test_saved_tensors_may_leave_the_device,
    test_swa_and_exponential_averages,
)
from tests.nn.test_torch_precision import (
    low,
    test_a_network_trains_under_autocast_and_a_scaler,
    test_a_scaler_skips_steps_with_infinite_gradients,
    test_autocast,
    test_autocast_leaves_float64_alone,
    test_autocast_of_every_path,
    test_compiled_autocast,
    test_half_parameters,
    test_mixed_dtypes_and_devices_are_errors,
    test_module_conversions,
    test_per_sample_gradients_under_autocast,
)
from tests.operators.test_torch_compile import (
    _fresh_compiler,
    test_a_profile_shows_the_operators,
    test_changing_batches_compile_twice,
    test_compiled_forward,
    test_compiled_training_equals_eager,
    test_dynamic_batches_compile_once,
    test_fake_tensors,
    test_index_tensors_of_no_connectivity_are_validated,
    test_leading_dimensions_compile,
    test_meta_construction_and_materialisation,
    test_networks_of_equal_shape_share_compiled_code,
    test_opcheck,
    test_other_activations_compile,
)
from tests.operators.test_torch_export import (
    test_a_program_exported_without_gradients_trains,
    test_an_exported_program_trains,
    test_aot_inductor,
    test_export,
    test_other_activations_export,
)


@pytest.fixture(autouse=True)
def default_device() -> Iterator[None]:
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


def on_cpu(model: Any) -> Any:
    return copy.deepcopy(model).to("cpu")


def test_a_layer_moves_there_and_back() -> None:
    model = layer()
    x = torch.randn(33, 30)
    y = model(x)
    host = on_cpu(model)
    assert host.connectivity is model.connectivity
    assert all(p.device.type == "cpu" for p in host.parameters())
    torch.testing.assert_close(host(x.cpu()), y.cpu())
    assert torch.equal(host.to("cuda")(x), y)
    assert torch.equal(host.cuda()(x), y)


def test_a_state_crosses_devices() -> None:
    model, x = layer(), torch.randn(33, 30)
    model(x).sum().backward()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True, map_location="cpu")
    assert state["_extra_state"].device.type == "cpu"
    host, again = on_cpu(layer()), layer()
    for other in (host, again):
        other.load_state_dict(state)
        assert_same(on_cpu(other), on_cpu(model))
    assert torch.equal(again(x), model(x))


def test_operands_on_two_devices_are_an_error() -> None:
    model, x = layer(), torch.randn(33, 30)
    with pytest.raises(ValueError, match="Expected synapse_weight on cpu like x, got cuda"):
        model(x.cpu())
    with pytest.raises(ValueError, match="Expected synapse_weight on cuda:0 like x, got cpu"):
        on_cpu(model)(x)


def test_autocast_of_another_device_changes_nothing() -> None:
    model, x = layer(), torch.randn(33, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.float32
