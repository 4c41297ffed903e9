"""Pruned modules, scipy matrices, Keras files, and models for runtimes without this package."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import dendrite_kernels as dk
from dendrite_kernels import interop
from tests import oracle
from tests.networks import NETWORKS


def test_pruned_linear(backend: str) -> None:
    linear: Any = nn.Linear(20, 12)
    prune.l1_unstructured(linear, "weight", amount=0.8)
    layer = interop.from_pruned(linear)
    x = torch.randn(5, 20)
    assert layer.connectivity.nnz == 48
    assert oracle.relative_error(layer(x), linear(x)) < 1e-6
    with torch.no_grad():
        linear.weight_orig.mul_(2)  # linear.weight lags behind until its next forward
    assert oracle.relative_error(interop.from_pruned(linear)(x), linear(x)) < 1e-6
    prune.random_unstructured(linear, "bias", amount=0.5)
    assert oracle.relative_error(interop.from_pruned(linear)(x), linear(x)) < 1e-6
    assert interop.from_pruned(nn.Linear(20, 12, bias=False)).connectivity.is_dense
    with pytest.raises(TypeError, match=r"Expected an nn\.Linear"):
        interop.from_pruned(nn.Conv2d(1, 1, 3))  # type: ignore[arg-type]


def test_pruned_pair(backend: str) -> None:
    twin = dk.DendriticLayer(dk.connectivity.random(20, 4, 3, 5, seed=0))
    dendrite, mask, soma, soma_mask = interop.to_masked_dense(twin)
    prune.custom_from_mask(dendrite, "weight", mask)
    prune.custom_from_mask(soma, "weight", soma_mask)
    layer = interop.from_pruned_pair(dendrite, soma)
    x = torch.randn(5, 20)
    assert layer.connectivity == twin.connectivity
    expected = F.leaky_relu(soma(F.leaky_relu(dendrite(x), 0.1)), 0.1)
    assert oracle.relative_error(layer(x), expected) < 1e-6


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", ["csr", "csc", "coo"])
def test_scipy(backend: str, form: str, dtype: Any) -> None:
    matrix = scipy.sparse.random(12, 20, 0.2, form, dtype=dtype, random_state=0)
    bias = np.random.default_rng(0).random(12).astype(dtype)
    layer = interop.from_scipy(matrix, bias)
    x = np.random.default_rng(1).random((5, 20)).astype(dtype)
    expected = torch.from_numpy((matrix @ x.T).T + bias)
    assert oracle.relative_error(layer(torch.from_numpy(x)), expected) < 1e-6
    assert abs(interop.to_scipy(layer) - matrix).max() == 0


def test_unsorted_scipy_indices_keep_their_weights() -> None:
    matrix = scipy.sparse.csr_array(([1.0, 2.0, 3.0], [3, 0, 1], [0, 2, 3]), shape=(2, 4))
    layer = interop.from_scipy(matrix)
    assert layer.weight.tolist() == [2, 1, 3]
    assert layer(torch.ones(4, dtype=torch.float64)).tolist() == [3, 3]


@pytest.mark.parametrize("form", ["coo", "csr", "csc"])
def test_scipy_duplicates(form: str) -> None:
    """Refused, or their values are added; those that cancel leave a synapse."""
    coo = scipy.sparse.coo_array(
        (np.array([1.0, 2, 4, -4, 3]), ([0, 0, 1, 1, 1], [2, 2, 0, 0, 3])), shape=(2, 4)
    )
    matrix: Any = coo
    if form == "csr":
        matrix = scipy.sparse.csr_array((coo.data, coo.coords[1], [0, 2, 5]), shape=(2, 4))
    elif form == "csc":
        data, rows, pointer = [4.0, -4, 1, 2, 3], [1, 1, 0, 0, 1], [0, 2, 2, 4, 5]
        matrix = scipy.sparse.csc_array((data, rows, pointer), shape=(2, 4))
    with pytest.raises(ValueError, match="Expected"):
        interop.from_scipy(matrix)
    stored = matrix.nnz
    layer = interop.from_scipy(matrix, duplicates="sum")
    assert matrix.nnz == stored
    assert layer.connectivity.nnz == 3
    assert layer.weight.tolist() == [3, 0, 3]
    x = torch.randn(5, 4).double()
    assert oracle.relative_error(layer(x), torch.from_numpy((matrix @ x.numpy().T).T)) < 1e-13


@pytest.mark.parametrize("dtype", [np.longdouble, np.complex64, np.int64, bool])
def test_scipy_matrices_of_other_dtypes(dtype: Any) -> None:
    matrix = scipy.sparse.csr_array(np.eye(3).astype(dtype))
    message = f"Expected a matrix of dtype float32 or float64, got {matrix.dtype}"
    with pytest.raises(TypeError, match=message):
        interop.from_scipy(matrix)


def test_scipy_bias_has_one_number_for_each_row() -> None:
    with pytest.raises(ValueError, match=r"Expected a bias of shape \[3\], got \[1\]"):
        interop.from_scipy(scipy.sparse.eye_array(3), [1.0])


Kernels = dict[str, list[np.ndarray[Any, Any]]]
NAMES = ["dend_1", "soma_1", "dend_2", "soma_2", "output"]


def keras_network(cabled: bool) -> tuple[Any, Kernels]:
    kind = "dANN-R" if cabled else "sANN"
    torch.manual_seed(0)
    model: Any = dk.models.build(kind, (5, 6), 9, 3, 4, 3, layers=2, seed=0)
    nn.init.normal_(model[-1].weight)
    matrices: list[nn.Linear] = []
    for module in model:
        if isinstance(module, dk.DendriticLayer):
            dendrite, _, soma, _ = interop.to_masked_dense(module)
            matrices += [dendrite, soma]
        elif isinstance(module, dk.SparseLinear):
            plain = nn.Linear(module.connectivity.in_features, module.connectivity.num_dendrites)
            with torch.no_grad():
                plain.weight.zero_()[module.connectivity.to_mask()] = module.weight
                plain.bias.copy_(module.bias)  # type: ignore[arg-type]
            matrices.append(plain)
        elif isinstance(module, nn.Linear):
            matrices.append(module)
    with torch.no_grad():
        for plain in matrices:
            nn.init.normal_(plain.bias)
    kernels = {
        name: [m.weight.detach().numpy().T.copy(), m.bias.detach().numpy().copy()]
        for name, m in zip(NAMES, matrices, strict=True)
    }
    return model, kernels


def described(names: Iterable[str]) -> dict[str, Any]:
    """The model of these dense layers as Keras describes it."""
    layers: list[tuple[str, dict[str, Any]]] = [("InputLayer", {}), ("Flatten", {})]
    for name in names:
        layers += [("Dense", {"name": name, "activation": "linear"})]
        if name != "output":
            layers += [("LeakyReLU", {"negative_slope": 0.1}), ("Dropout", {"rate": 0.2})]
    layers += [("Activation", {"activation": "softmax"})]
    made = [{"class_name": kind, "config": config} for kind, config in layers]
    return {"class_name": "Functional", "config": {"layers": made}}


def write(path: Path, form: str, kernels: Kernels, config: Any = None) -> None:
    """A file as Keras 2 (model or weights) or Keras 3 (weights or .keras) lays it out."""
    config = described(kernels) if config is None else config
    h5py = pytest.importorskip("h5py")
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        if form.startswith("keras 2"):
            root = file.create_group("model_weights") if form == "keras 2 model" else file
            names = ["input_1", *kernels]
            if form == "keras 2 model":
                file.attrs["model_config"] = json.dumps(config)
            root.attrs["layer_names"] = [name.encode() for name in names]
            for name in names:
                group = root.create_group(name)
                weights = kernels.get(name, [])
                parts = ["kernel", "bias", "third", "fourth"][: len(weights)]
                labels = [f"{name}/{part}:0" for part in parts]
                group.attrs["weight_names"] = [label.encode() for label in labels]
                for label, value in zip(labels, weights, strict=True):
                    group[label] = value
        else:
            for i, (name, weights) in enumerate(kernels.items()):
                label = name if form == "keras 3 named" else "dense" + f"_{i}" * (i > 0)
                for j, value in enumerate(weights):
                    file[f"layers/{label}/vars/{j}"] = value
            file["layers/dropout/seed_generator/vars/0"] = np.zeros(2, np.uint32)
            file.create_group("layers/input_layer/vars")
    if form in ("keras 3 named", "keras 3 numbered"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("config.json", json.dumps(config))
            archive.writestr("model.weights.h5", buffer.getvalue())
        return
    path.write_bytes(buffer.getvalue())


def exact(kernels: Kernels, x: torch.Tensor) -> torch.Tensor:
    h = x.double()
    for name, (kernel, bias) in kernels.items():
        h = h @ torch.from_numpy(kernel).double() + torch.from_numpy(bias).double()
        h = h if name == "output" else F.leaky_relu(h, 0.1)
    return h


FORMS = ["keras 2 model", "keras 2 weights", "keras 3 weights", "keras 3 named", "keras 3 numbered"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cabled", [True, False], ids=["dANN", "sANN"])
def test_keras_files(form: str, cabled: bool, tmp_path: Path) -> None:
    path = tmp_path / "model"
    model, kernels = keras_network(cabled)
    write(path, form, kernels)
    loaded = interop.from_keras(path)
    x = torch.randn(7, 30)
    assert oracle.relative_error(loaded(x), exact(kernels, x)) < 1e-5
    kinds = [type(m) for m in loaded]
    assert kinds == [type(m) for m in model]


def test_keras_masks_keep_synapses_of_weight_zero(tmp_path: Path) -> None:
    _, kernels = keras_network(True)
    masks = [weights[0] != 0 for weights in kernels.values()]
    kernels["dend_1"][0][masks[0]] = 0
    write(tmp_path / "model", "keras 2 model", kernels)
    loaded: Any = interop.from_keras(tmp_path / "model", [*masks[:4], None])
    assert loaded[0].connectivity.nnz == masks[0].sum()
    assert isinstance(loaded[1], dk.DendriticLayer)
    with pytest.raises(ValueError, match=r"Expected mask of dend_1 of its .* \[30, 27\], got"):
        interop.from_keras(tmp_path / "model", [masks[1]])
    for wrong in (0.5, 2, np.nan):
        with pytest.raises(ValueError, match=f"Expected mask of dend_1 of values .* got {wrong}"):
            interop.from_keras(tmp_path / "model", [masks[0] * wrong])
    with pytest.raises(ValueError, match="Expected at most 5 masks, got 6"):
        interop.from_keras(tmp_path / "model", [*masks, None])


def test_files_that_are_not_of_keras(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_text("no")
    with pytest.raises(ValueError, match=r"Expected a \.keras or HDF5 file"):
        interop.from_keras(path)
    write(path, "keras 3 weights", {})
    with pytest.raises(ValueError, match="Expected dense layers"):
        interop.from_keras(path)
    _, kernels = keras_network(True)
    kernels.pop("output")
    write(path, "keras 3 weights", kernels)
    with pytest.raises(ValueError, match="Expected pairs of dense layers and an output"):
        interop.from_keras(path)
    write(path, "keras 2 model", kernels)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"Expected a .keras or HDF5 file of Keras.*truncated"):
        interop.from_keras(path)
    torch.save({}, path)
    with pytest.raises(ValueError, match=r"Expected a .keras or HDF5 file of Keras.*config.json"):
        interop.from_keras(path)


LEAKY = {"class_name": "LeakyReLU", "config": {"negative_slope": 0.1}}


def changed(at: int, kind: str, **options: Any) -> Any:
    """The description of the network with another layer in the place of one."""
    config = described(NAMES)
    config["config"]["layers"][at] = {"class_name": kind, "config": {"name": "it", **options}}
    return config


@pytest.mark.parametrize("form", ["keras 2 model", "keras 3 numbered"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(1, "Rescaling"), r"nothing behind the input, got \['Rescaling'\]"),
        (changed(4, "BatchNormalization"), r"dend_1, got \[0.1, 'BatchNormalization'\]"),
        (changed(3, "PReLU"), r"a leaky ReLU of negative_slope 0.1 behind dend_1, got \['PReLU'\]"),
        (changed(3, "LeakyReLU", alpha=0.3), r"behind dend_1, got \[0.3\]"),
        (changed(3, "ReLU", max_value=6.0), r"behind dend_1, got \['ReLU'\]"),
        (changed(3, "Dropout"), r"behind dend_1, got \[\]"),
        (changed(2, "Dense", activation="tanh"), r"behind it, got \['tanh', 0.1\]"),
        (changed(15, "Activation", activation="tanh"), r"softmax behind output, got \['tanh'\]"),
        ({"class_name": "Mine", "config": {}}, "Sequential or Functional model, got Mine"),
    ],
)
def test_keras_models_that_compute_something_else(
    form: str, config: Any, message: str, tmp_path: Path
) -> None:
    write(tmp_path / "model", form, keras_network(True)[1], config)
    with pytest.raises(ValueError, match=f"Expected .*{message}"):
        interop.from_keras(tmp_path / "model")


def test_keras_layers_that_are_used_twice(tmp_path: Path) -> None:
    config = described(NAMES)
    config["config"]["layers"][2]["inbound_nodes"] = [{}, {}]
    write(tmp_path / "model", "keras 2 model", keras_network(True)[1], config)
    with pytest.raises(ValueError, match="Expected each layer to be used once, got dend_1 again"):
        interop.from_keras(tmp_path / "model")


@pytest.mark.parametrize(
    "config",
    [
        changed(3, "LeakyReLU", alpha=float(np.float32(0.1))),
        changed(3, "ReLU", negative_slope=0.1),
        changed(3, "Activation", activation=LEAKY),
        changed(15, "Softmax"),
    ],
)
def test_keras_activations(config: Any, tmp_path: Path) -> None:
    write(tmp_path / "model", "keras 2 model", keras_network(True)[1], config)
    assert len(interop.from_keras(tmp_path / "model")) == 3


@pytest.mark.parametrize("form", ["keras 2 weights", "keras 3 weights"])
@pytest.mark.parametrize("kind", ["norm", "conv", "lstm", "prelu", "width", "bias"])
def test_keras_weights_of_other_layers(form: str, kind: str, tmp_path: Path) -> None:
    _, kernels = keras_network(True)
    shapes: dict[str, list[tuple[int, ...]]] = {
        "norm": [(27,)] * 4, "conv": [(3, 3, 1, 8), (8,)], "lstm": [(30, 27), (27, 27), (27,)],
        "prelu": [(27,)], "width": [(5, 5), (5,)], "bias": [(27, 9), (8,)],
    }  # fmt: skip
    kernels["soma_1"] = [np.ones(shape, np.float32) for shape in shapes[kind]]
    write(tmp_path / "model", form, kernels)
    with pytest.raises(ValueError, match=r"Expected .*(soma_1|dense_1)"):
        interop.from_keras(tmp_path / "model")


@pytest.mark.parametrize("form", ["keras 2 weights", "keras 3 weights"])
def test_keras_weights_that_look_like_a_kernel(form: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    write(path, form, keras_network(True)[1])
    with pytest.importorskip("h5py").File(path, "a") as file:
        if form == "keras 3 weights":
            file["layers/embedding/vars/0"] = np.ones((9, 9))
        else:
            file["input_1/embeddings:0"] = np.ones((30, 30))
            file["input_1"].attrs["weight_names"] = ["embeddings:0"]
    with pytest.raises(ValueError, match=r"Expected dense layers, got .*embedding"):
        interop.from_keras(path)


class MaskedLinear(nn.Linear):
    def __init__(self, inputs: int, outputs: int, mask: torch.Tensor) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.get_buffer("mask"), self.bias)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """No forward of its own."""


def test_masks_of_a_class_count() -> None:
    mask = torch.rand(12, 20) < 0.3
    masked = MaskedLinear(20, 12, mask.float())
    layer, x = interop.from_pruned(masked), torch.randn(5, 20)
    assert torch.equal(layer.connectivity.to_mask(), mask)
    assert oracle.relative_error(layer(x), masked(x)) < 1e-6
    prune.l1_unstructured(masked, "weight", 0.5)
    assert oracle.relative_error(interop.from_pruned(masked)(x), masked(x)) < 1e-6
    cable = torch.arange(12) // 3 == torch.arange(4)[:, None]
    pair = interop.from_pruned_pair(masked, MaskedLinear(12, 4, cable.float()))
    assert pair.connectivity.nnz == int(masked.get_buffer("weight_mask")[mask].sum())
    for other in (Renamed(20, 12), nn.utils.parametrizations.weight_norm(nn.Linear(20, 12))):
        assert oracle.relative_error(interop.from_pruned(other)(x), other(x)) < 1e-6


@pytest.mark.parametrize("is_pruned", [True, False])
def test_what_a_class_or_a_hook_does_is_not_lost(is_pruned: bool) -> None:
    patched: Any = nn.Linear(20, 12)
    patched.forward = torch.tanh
    doubled, hooked = Doubled(20, 12), nn.Linear(20, 12)
    hooked.register_forward_hook(lambda *args: 2 * args[-1])
    for module, message in (
        (doubled, "Expected Doubled to compute"),
        (patched, "Expected Linear to give"),
        (hooked, "Expected a layer without hooks, got Linear"),
    ):
        if is_pruned:
            prune.l1_unstructured(module, "weight", 0.5)
        with pytest.raises(ValueError, match=message):
            interop.from_pruned(module)
        with pytest.raises(ValueError, match=message):
            interop.from_pruned_pair(nn.Linear(9, 20), module)
    ours: Any = dk.SparseLinear(NETWORKS["ragged"]())
    ours.register_forward_hook(lambda *args: 2 * args[-1])
    with pytest.raises(ValueError, match="Expected a layer without hooks, got SparseLinear"):
        interop.from_pruned(ours)


def test_pruned_weights_are_those_of_the_next_forward() -> None:
    """torch.nn.utils.prune brings the attribute up to date before each forward only."""
    ours = dk.DendriticLayer(dk.connectivity.random(20, 4, 3, 5, seed=0))
    sparse = dk.SparseLinear(ours.connectivity)
    dendrite, _, soma, soma_mask = interop.to_masked_dense(ours)
    x = torch.randn(5, 20)
    for module, name in (
        (ours, "synapse_weight"), (ours, "dendrite_bias"), (ours, "cable_weight"),
        (sparse, "weight"), (dendrite, "weight"), (soma, "bias"),
    ):  # fmt: skip
        prune.l1_unstructured(module, name, 0.5)

    def dense(dendrite: nn.Module, soma: nn.Module) -> torch.Tensor:
        return F.leaky_relu(soma(F.leaky_relu(dendrite(x), 0.1)), 0.1)

    loss = ours(x).square().sum() + sparse(x).square().sum() + dense(dendrite, soma).square().sum()
    loss.backward()
    parameters = [p for m in (ours, sparse, dendrite, soma) for p in m.parameters()]
    torch.optim.SGD(parameters, lr=0.1).step()
    kept = dendrite.get_buffer("weight_mask") != 0
    plain = interop.to_masked_dense(ours)
    matrix = interop.to_scipy(sparse)
    layer = interop.from_masked_dense(dendrite, kept, soma, soma_mask)
    assert all(p.requires_grad for p in layer.parameters())
    assert oracle.relative_error(dense(plain[0], plain[2]), ours(x)) < 1e-6
    with torch.no_grad():
        expected = sparse(x) - sparse.bias  # type: ignore[operator]
        soma.weight.mul_(soma_mask)
    assert oracle.relative_error(torch.from_numpy((matrix @ x.numpy().T).T), expected) < 1e-5
    assert oracle.relative_error(layer(x), dense(dendrite, soma)) < 1e-6


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_other_hooks_compute_are_refused() -> None:
    soma = nn.Linear(12, 4)
    cable = torch.arange(12) // 3 == torch.arange(4)[:, None]
    for normed in (
        nn.utils.weight_norm(nn.Linear(20, 12)),
        nn.utils.spectral_norm(nn.Linear(20, 12)),
    ):
        with pytest.raises(ValueError, match="Expected weight of Linear to be a parameter"):
            interop.from_masked_dense(normed, torch.ones(12, 20), soma, cable)
        with pytest.raises(ValueError, match="Expected"):
            interop.from_pruned(normed)


@pytest.mark.parametrize("network", list(NETWORKS))
def test_portable_models_compute_the_same(network: str) -> None:
    c = NETWORKS[network]()
    x = torch.randn(5, c.in_features)
    for module in (
        dk.DendriticLayer(c),
        dk.DendriticLayer(c, bias=False, activation="tanh"),
        dk.SparseLinear(c),
    ):
        plain = interop.portable(nn.Sequential(module, nn.Dropout())).eval()
        assert not any(isinstance(m, type(module)) for m in plain.modules())
        assert oracle.relative_error(plain(x), module(x)) < 1e-6


def test_portable_rows_ignore_what_they_do_not_see() -> None:
    layer = dk.SparseLinear(NETWORKS["ragged"]())
    x = torch.randn(5, 61)
    x[0] = torch.inf
    seen = layer.connectivity.to_mask().any(1)
    assert interop.portable(layer)(x)[0, ~seen].isfinite().all()


@pytest.mark.parametrize("kind", ["dANN-R", "dANN-LRF", "sANN"])
def test_onnx(kind: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = dk.models.build(kind, (6, 7), 9, 3, 4, 3, seed=0, init="fan_in").eval()
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        interop.portable(model), (torch.randn(4, 42),), tmp_path / "model.onnx",
        dynamo=True, dynamic_shapes=({0: batch},), verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for samples in (1, 2, 33):
        x = torch.randn(samples, 42)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert oracle.relative_error(torch.from_numpy(y), model(x)) < 1e-5
