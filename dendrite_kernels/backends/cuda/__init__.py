"""The CUDA backend: extension module _cuda on the current stream; every buffer is a torch tensor.

Activations are float32, bfloat16, float16 (or float64, for tests); parameters of half precision are
widened first, since sums run in float32. The first call with a batch of some size may copy packed
synapses to the device; later ones neither synchronise nor copy, so that CUDA graphs can capture
them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from ...structure import Connectivity
from .. import _extension
from ..protocol import AdamStep, Gradients, Maybe, Operands
from . import pack
from . import plan as planner
from .plan import Kind, Limits, TilePlan, Work

_ALIGNMENT = 16  # bytes, of vector loads

STORES_LOW = True
ROUNDS_X = False
STEPS = True


@functools.cache
def _load() -> tuple[Any, str | None]:
    """The extension and None, or None and the reason. A broken extension raises its own error."""
    built = _extension.is_built("_cuda")
    try:
        from dendrite_kernels import _cuda  # type: ignore[attr-defined]
    except ImportError:
        if built:
            raise
        return None, (
            "the extension dendrite_kernels._cuda was not built, which a plain install does where"
            " it finds CUDA's compiler nvcc and a GPU; reinstall with"
            " DENDRITE_KERNELS_REQUIRE=cuda, which builds it or shows why it cannot; or move"
            " the layer and its input to the CPU"
        )
    _cuda.configure(torch.Tensor.__dlpack_c_exchange_api__)
    return _cuda, None


def unavailable() -> str | None:
    reason = _load()[1]
    if reason is None and not torch.cuda.is_available():
        return (
            "the extension dendrite_kernels._cuda is built, but torch sees no CUDA device"
            f" (torch {torch.__version__}, CUDA {torch.version.cuda})"
        )
    return reason


def info() -> dict[str, Any]:
    extension = _load()[0]
    return {
        "archs": extension.archs,
        "cuda_runtime": extension.runtime_version(),
        "cuda_driver": extension.driver_version(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


@functools.cache
def _limits(index: int) -> Limits:
    return Limits(*_load()[0].limits(index))


def _stream(device: torch.device) -> int:
    stream: int = torch._C._cuda_getCurrentRawStream(device.index)  # 10x faster than the public way
    return stream


@functools.lru_cache(maxsize=4096)
def _bound(plan: TilePlan) -> Any:
    """The plan as the extension takes it."""
    kind = plan.kind
    return _load()[0].Plan(
        kind.vec, kind.groups, kind.shared, plan.blocks, plan.threads, plan.parts,
        max(plan.tile_groups, 1), plan.staged,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Layout:
    """Packed synapses on a device."""

    packed: Any
    tensors: list[torch.Tensor]  # that `packed` is made of
    slots: int
    has_pads: bool
    is_csr: bool  # slots are positions in CSR order: weights need no packing
    streams: set[int]  # that have used them

    def on(self, stream: int) -> _Layout:
        """This layout, for kernels on the current stream of its device.

        The allocator hands memory that is freed to the stream where it was allocated. It must know
        of the other streams whose kernels may still read it then.
        """
        if stream not in self.streams:
            for tensor in self.tensors:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
            self.streams.add(stream)
        return self


def _to(device: torch.device, array: Any) -> Maybe:
    return None if array is None else torch.from_numpy(array).to(device)


def _upload(
    packing: pack.Packing, kind: Kind, rows: int, outputs: int, device: torch.device
) -> _Layout:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Expected a call with a batch of this size before its capture in a CUDA graph, got"
            " none: the first one copies synapses to the device"
        )
    arrays = (packing.outputs, packing.bundles, packing.rows, packing.steps, packing.index)
    tensors = [_to(device, a) for a in (*arrays, packing.dendrite, packing.source)]
    packed = _load()[0].Packed(packing.team_bits, *tensors, kind.groups, rows, outputs)
    return _Layout(
        packed, [t for t in tensors if t is not None], packing.slots, packing.has_pads,
        is_csr=packing.source is None, streams={_stream(device)},
    )  # fmt: skip


def _rows(c: Connectivity, device: torch.device, kind: Kind, somas: bool, stream: int) -> _Layout:
    def make() -> _Layout:
        outputs = c.num_somas if somas else c.num_dendrites
        return _upload(pack.pack_rows(c, kind, somas), kind, c.num_dendrites, outputs, device)

    layout: _Layout = c.cached(("cuda rows", device, kind.groups, somas), make)
    return layout.on(stream)


def _columns(
    c: Connectivity, device: torch.device, plan: TilePlan, somas: bool, stream: int
) -> _Layout:
    kind, staged = plan.kind, plan.staged

    def make() -> _Layout:
        packing = pack.pack_columns(c, kind, somas, staged)
        return _upload(packing, kind, c.in_features, c.in_features, device)

    layout: _Layout = c.cached(("cuda columns", device, kind.groups, somas, staged), make)
    return layout.on(stream)


def _wide(like: torch.Tensor, tensor: Maybe) -> Maybe:
    """A parameter in the type of sums."""
    if tensor is None:
        return None
    return tensor.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def _pack(
    layout: _Layout, weight: torch.Tensor, cable: Maybe, stream: int
) -> torch.Tensor:  # [nnz] -> [slots]
    if layout.is_csr or layout.slots == 0:
        return weight if weight.data_ptr() % _ALIGNMENT == 0 else weight.clone()
    packed = weight.new_empty(layout.slots)
    rows = 0 if cable is None else cable.shape[0]
    _load()[0].pack_weight(layout.packed, weight, cable, weight.shape[0], rows, packed, stream)
    return packed


def _tiles(
    plan: TilePlan, samples: torch.Tensor, y: Maybe, slope: float, has_pads: bool, gradient: bool,
    stream: int,
) -> torch.Tensor:  # fmt: skip
    """[B, columns] -> [tiles, columns (+ 1 for pads), samples]."""
    dtype = samples.dtype
    if gradient and dtype != torch.float64:
        dtype = torch.float32
    shape = plan.tiles, samples.shape[1] + has_pads, plan.kind.samples
    out = torch.empty(shape, dtype=dtype, device=samples.device)
    _load()[0].make_tiles(samples, y, slope, shape[1], out, _bound(plan), gradient, stream)
    return out


def forward(
    x: torch.Tensor, operands: Operands, save_signs: bool, round_x: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, rows = x.shape[0], operands.connectivity.num_dendrites
    outputs = rows if operands.cable_weight is None else operands.connectivity.num_somas
    y = x.new_empty((batch, outputs))
    signs = x.new_empty(((batch + 31) // 32 if save_signs else 0, rows), dtype=torch.int32)
    if batch:
        _forward(x, operands, y, signs if save_signs else None)
    return y, signs


def _forward(x: torch.Tensor, operands: Operands, y: torch.Tensor, signs: Maybe) -> None:
    weight, dendrite_bias, cable, soma_bias, connectivity, slope, soma_slope = operands
    batch, inputs = x.shape
    stream = _stream(x.device)
    limits = _limits(x.device.index)
    weight, dendrite_bias, cable, soma_bias = (  # type: ignore[assignment]
        _wide(x, t) for t in (weight, dendrite_bias, cable, soma_bias)
    )
    somas = cable is not None
    plan, tiles, few_blocks = None, None, 0
    if batch <= planner.FEW_SAMPLES:
        layout = _rows(connectivity, x.device, Kind(1, 1, False), somas, stream)
        warps = y.shape[1] if somas else -(-y.shape[1] // 32)
        few_blocks = min(-(-warps // 4), 16 * limits.multiprocessors)
    else:
        rows = connectivity.num_dendrites
        work = Work(batch, inputs, y.shape[1], rows, connectivity.nnz, x.itemsize)
        plan = planner.plan_tiles(work, limits)
        layout = _rows(connectivity, x.device, plan.kind, somas, stream)
        if not plan.kind.shared:
            tiles = _tiles(plan, x, None, 0.0, layout.has_pads, False, stream)
    _load()[0].forward(
        layout.packed, x, tiles, inputs + layout.has_pads,
        _pack(layout, weight, None, stream), dendrite_bias, cable, soma_bias, slope,
        soma_slope, y, signs,
        None if plan is None else _bound(plan), few_blocks, stream,
    )  # fmt: skip


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: Maybe,
    signs: Maybe,
    operands: Operands,
    need_x: bool,
    step: AdamStep | None = None,
) -> Gradients:
    weight, dendrite_bias, cable, _, connectivity, slope, soma_slope = operands
    batch, inputs = x.shape
    if batch == 0:  # no sample, no kernel: gradients are zero
        rows = connectivity.num_dendrites
        of_somas = (0, 0) if cable is None else (rows, connectivity.num_somas)
        dw, dbd, dc, dbs = (weight.new_zeros(n) for n in (connectivity.nnz, rows, *of_somas))
        return x.new_empty((0, inputs)), dw, dbd, dc, dbs
    narrow = weight.dtype  # of the parameters and their gradients
    weight, dendrite_bias, cable = (  # type: ignore[assignment]
        _wide(x, t) for t in (weight, dendrite_bias, cable)
    )
    operands = Operands(weight, dendrite_bias, cable, None, connectivity, slope, soma_slope)
    dx = x.new_empty((batch if need_x else 0, inputs))
    # A step changes the weight, so it comes last; without one dx and partial sums need not be
    # there at the same time.
    if need_x and step is not None:
        _backward_input(dx, grad, y, signs, operands)
    gradients = _backward_weight(grad, x, y, signs, operands, step)
    if need_x and step is None:
        _backward_input(dx, grad, y, signs, operands)
    dw, dbd, dc, dbs = (t.to(narrow) for t in gradients)
    return dx, dw, dbd, dc, dbs


def _backward_weight(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: Maybe,
    signs: Maybe,
    operands: Operands,
    step: AdamStep | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dw, dbd, dc and dbs, in the type of sums."""
    weight, dendrite_bias, cable, _, connectivity, slope, soma_slope = operands
    batch, inputs = x.shape
    rows, outputs = connectivity.num_dendrites, grad.shape[1]
    extension, device, stream = _load()[0], x.device, _stream(x.device)
    limits = _limits(device.index)
    somas = cable is not None

    plan = planner.plan_weight(
        Work(batch, inputs, outputs, rows, connectivity.nnz, x.itemsize), limits
    )
    layout = _rows(connectivity, device, plan.kind, somas, stream)
    grad_v = _tiles(plan, grad, y, soma_slope, False, True, stream)
    tiles = None
    if not plan.kind.shared:
        tiles = _tiles(plan, x, None, 0.0, layout.has_pads, False, stream)
    groups = plan.tile_groups
    dw, dbd = weight.new_empty(0 if step else weight.shape[0]), weight.new_empty(rows)
    dc = dbs = weight.new_empty(0)
    partial_soma: Maybe = None
    if somas:
        dc, dbs = weight.new_empty(rows), weight.new_empty(outputs)
        partial_soma = weight.new_empty((groups, outputs))
    # One group in CSR order needs no memory of its own: sums are scaled where they are.
    in_place = step is None and groups == 1 and layout.is_csr
    partial = dw.unsqueeze(0) if in_place else weight.new_empty((groups, layout.slots))
    partial_row = weight.new_empty((groups, rows))
    extension.backward_weight(
        layout.packed, x, tiles, inputs + layout.has_pads, grad_v, signs, slope,
        partial, partial_row, partial_soma, _bound(plan), stream,
    )  # fmt: skip
    del tiles
    adam = None
    if step is not None:
        adam = extension.Adam(
            step.lr, step.beta1, step.beta2, step.eps, step.weight_decay, step.decoupled
        )
    extension.finish_weight(
        layout.packed, x, partial, partial_row, partial_soma,
        weight, dendrite_bias, cable, weight.shape[0],
        None if step else dw, dbd, dc if somas else None, dbs if somas else None, groups,
        adam, *(step[:3] if step else (None, None, None)), stream,
    )  # fmt: skip
    return dw, dbd, dc, dbs


def _backward_input(
    dx: torch.Tensor, grad: torch.Tensor, y: Maybe, signs: Maybe, operands: Operands
) -> None:
    weight, _, cable, _, connectivity, slope, soma_slope = operands
    batch, inputs = dx.shape
    device, stream = dx.device, _stream(dx.device)
    sign_rows = 0 if cable is None else connectivity.num_dendrites
    work = Work(batch, grad.shape[1], inputs, inputs, connectivity.nnz, weight.itemsize, sign_rows)
    plan = planner.plan_tiles(work, _limits(device.index))
    layout = _columns(connectivity, device, plan, cable is not None, stream)
    grad_v = _tiles(plan, grad, y, soma_slope, layout.has_pads, True, stream)
    _load()[0].backward_input(
        layout.packed, connectivity.num_dendrites, grad_v.shape[1], grad_v, signs,
        _pack(layout, weight, cable, stream), slope, dx, _bound(plan), stream,
    )  # fmt: skip
