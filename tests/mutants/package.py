"""Mutants of the package in Python."""

from __future__ import annotations

from .plant import Mutant

_STRUCTURE = "tests/structure/test_structure.py"
_RULES = "tests/structure/test_connectivity.py"
_CENTRES = "tests/structure/test_centres.py"
_FORMATS = "tests/structure/test_formats.py"
_TRANSPOSED = "tests/structure/test_transposed.py"
_EDGES = "tests/structure/test_edges.py"

CONNECTIVITY = {
    "structure: a synapse may be there twice": Mutant(
        "dendrite_kernels/_validate.py",
        "falls = columns[1:] <= columns[:-1]",
        "falls = columns[1:] < columns[:-1]",
        _STRUCTURE,
    ),
    "structure: one input too many for 16 bits": Mutant(
        "dendrite_kernels/structure.py",
        "columns.astype(np.uint16) if self.in_features <= 65536",
        "columns.astype(np.uint16) if self.in_features <= 65537",
        f"{_STRUCTURE} {_TRANSPOSED}",
    ),
    "structure: networks of other somas have one digest": Mutant(
        "dendrite_kernels/structure.py",
        "for tensor in (self.crow_indices, self.col_indices, self.soma_ptr):",
        "for tensor in (self.crow_indices, self.col_indices):",
        _STRUCTURE,
    ),
    "plan: pads have the weight of the first synapse": Mutant(
        "dendrite_kernels/transposed.py",
        "of_block.fill(slots.size)",
        "of_block.fill(0)",
        _TRANSPOSED,
    ),
    "plan: blocks one slot too large for 16 bits": Mutant(
        "dendrite_kernels/transposed.py",
        "narrow = np.uint16 if max(totals) <= _NARROW_SLOTS else np.int32",
        "narrow = np.uint16 if max(totals) <= _NARROW_SLOTS + 1 else np.int32",
        _TRANSPOSED,
    ),
    "rules: fields reach below the image": Mutant(
        "dendrite_kernels/connectivity.py", "(y >= height)", "(y > height)", _RULES
    ),
    "rules: channels first with the stride of channels last": Mutant(
        "dendrite_kernels/connectivity.py",
        "channel[:, None] * np.int32(pixels)",
        "channel[:, None] * np.int32(channels)",
        _RULES,
    ),
    "centres: the grid is not in the middle": Mutant(
        "dendrite_kernels/centres.py",
        "np.arange((size - 1) % step // 2, size, step)",
        "np.arange(size % step // 2, size, step)",
        _CENTRES,
    ),
    "edges: weights stay in the order of the table": Mutant(
        "dendrite_kernels/edges.py", "_sums(weight[by_edge], new)", "_sums(weight, new)", _EDGES
    ),
    "combine: side by side, the second network on the inputs of the first": Mutant(
        "dendrite_kernels/_combine.py", "[0, *ends[:-1]]", "[0] * len(parts)", _FORMATS
    ),
}

_ACTIVATIONS = "tests/functional/test_soma_activation.py"
_TRANSFORMS = "tests/autograd/test_torch_transforms.py"
_FAST = "tests/autograd/test_fast_path.py"
_COMPILE = "tests/operators/test_torch_compile.py"

AUTOGRAD = {
    "autograd: backward forgets the backend of forward": Mutant(
        "dendrite_kernels/autograd.py",
        "ctx.rest = indices, slopes, backends.chosen.get()",
        "ctx.rest = indices, slopes, None",
        "tests/backends/test_backend_choice.py",
    ),
    "autograd: of a sparse linear layer the bias may not need its gradient": Mutant(
        "dendrite_kernels/autograd.py",
        "if requires_grad and is_grad_enabled():",
        "if requires_grad and is_grad_enabled() and synapse_weight.requires_grad:",
        _FAST,
    ),
    "activations: somas have the slope of dendrites": Mutant(
        "dendrite_kernels/activations.py",
        "slope if soma_activation is None else slope_of(soma_activation, negative_slope)",
        "slope",
        _ACTIVATIONS,
    ),
    "activations: an infinite slope passes": Mutant(
        "dendrite_kernels/activations.py",
        "if not 0 <= slope < math.inf:",
        "if not 0 <= slope:",
        "tests/functional/test_errors.py::test_bad_slope",
    ),
    "operators: vmap over another dimension than the first": Mutant(
        "dendrite_kernels/operators.py",
        "x = x.movedim(in_dims[0], 0)",
        "x = x.movedim(0, 0)",
        f"{_TRANSFORMS}::test_transforms_are_exact",
    ),
    "operators: a pending sign is not resolved": Mutant(
        "dendrite_kernels/operators.py",
        "return (t.resolve_neg() if t.is_neg() else t).contiguous()",
        "return t.contiguous()",
        "tests/functional/test_errors.py::test_pending_sign_is_not_lost",
    ),
    "operators: compiled code gets one sign word too many": Mutant(
        "dendrite_kernels/operators.py",
        "words = (x.shape[0] + 31) // 32 if save_signs",
        "words = x.shape[0] // 32 + 1 if save_signs",
        f"{_COMPILE}::test_tensors_without_memory_have_the_shapes_of_real_ones",
    ),
    "operators: another soma_ptr leads to the old connectivity": Mutant(
        "dendrite_kernels/operators.py",
        "found.crow_indices is crow and found.soma_ptr is soma_ptr:",
        "found.crow_indices is crow:",
        f"{_COMPILE}::test_columns_of_a_connectivity_serve_other_somas",
    ),
    "transforms: the second derivative lacks a term": Mutant(
        "dendrite_kernels/transforms.py",
        "by_grad = by_grad + linear(of_dx, weight, None, ctx.connectivity)",
        "by_grad = linear(of_dx, weight, None, ctx.connectivity)",
        f"{_TRANSFORMS}::test_gradgradcheck",
    ),
    "fast path: taken in forward mode": Mutant(
        "dendrite_kernels/fast_path.py",
        "        or forward_ad._current_level >= 0\n",
        "",
        f"{_TRANSFORMS}::test_forward_mode",
    ),
    "functional: images of one channel keep a dimension": Mutant(
        "dendrite_kernels/functional.py",
        "return x.flatten(1 if one_channel else -len(shape))",
        "return x.flatten(-len(shape))",
        "tests/functional/test_images.py",
    ),
}

_STATE = "tests/nn/test_state.py"
_FILES = "tests/nn/test_files.py"

STATE = {
    "packing: channels first is lost": Mutant(
        "dendrite_kernels/packing.py",
        "c.channels_first, len(shape)",
        "False, len(shape)",
        f"{_STATE} tests/functional/test_images.py",
    ),
    "packing: averages may be off by a half": Mutant(
        "dendrite_kernels/packing.py", ".abs() < 0.1", ".abs() < 0.5", _STATE
    ),
    "state: a connectivity of the same size is enough": Mutant(
        "dendrite_kernels/nn.py",
        "reason = None if saved == expected else difference(expected, saved)",
        "reason = None if saved.nnz == expected.nnz else difference(expected, saved)",
        _STATE,
    ),
    "files: frozen parameters train again": Mutant(
        "dendrite_kernels/files.py",
        "model.get_parameter(name).requires_grad_(False)",
        "model.get_parameter(name)",
        _FILES,
    ),
    "files: a loaded model lives in its file": Mutant(
        "dendrite_kernels/files.py", "file.get_tensor(name).clone()", "file.get_tensor(name)",
        _FILES,
    ),
    "npz: compressed entries are unpacked": Mutant(
        "dendrite_kernels/_npz.py",
        "entry.compress_type != zipfile.ZIP_STORED",
        "entry.compress_type == 99",
        "tests/nn/test_hostile_files.py",
    ),
}  # fmt: skip

_PLASTICITY = "tests/nn/test_plasticity.py"
_GROWTH = "tests/nn/test_growth.py"
_CASCADE = "tests/nn/test_cascade.py"

PLASTICITY = {
    "rewiring: the optimizer's numbers stay with their places": Mutant(
        "dendrite_kernels/_rewire.py",
        "return [*found, *(state[name] for state, name in numbers_of(weight, own))]",
        "return found",
        _PLASTICITY,
    ),
    "rewiring: new synapses inherit a weight": Mutant(
        "dendrite_kernels/_rewire.py",
        "moved = [tensor[place].masked_fill(is_new, 0) for tensor in tensors]",
        "moved = [tensor[place] for tensor in tensors]",
        _PLASTICITY,
    ),
    "rewiring: the least scores grow": Mutant(
        "dendrite_kernels/_growth.py", "ranks(free.counts, -scores)", "ranks(free.counts, scores)",
        _PLASTICITY,
    ),
    "rewiring: the last free place is never drawn": Mutant(
        "dendrite_kernels/_growth.py", "uniform[j] * (least + j + 1)", "uniform[j] * (least + j)",
        _PLASTICITY,
    ),
    "rewiring: every step makes the same draws": Mutant(
        "dendrite_kernels/plasticity.py",
        'key = self.steps, ("moves", "candidates").index(use)',
        'key = 0, ("moves", "candidates").index(use)',
        _PLASTICITY,
    ),
    "rewiring: gradients of the second backward pass replace the first": Mutant(
        "dendrite_kernels/plasticity.py",
        "self._scores = found if self._scores is None else self._scores + found",
        "self._scores = found",
        _PLASTICITY,
    ),
    "growth: gradients are lost": Mutant(
        "dendrite_kernels/_new_dendrites.py",
        "grad = None if p.grad is None else _widened(p.grad, where)",
        "grad = None",
        _GROWTH,
    ),
    "growth: frozen dendrites are numbered as before": Mutant(
        "dendrite_kernels/_new_dendrites.py",
        "return torch.from_numpy(pointer[self._somas] + self._places)",
        "return torch.from_numpy(pointer[0] + self._places)",
        _CASCADE,
    ),
    "growth: momentum moves frozen weights": Mutant(
        "dendrite_kernels/_new_dendrites.py",
        "            parameter[index] = values\n",
        "            pass\n",
        _CASCADE,
    ),
    "adam: autograd does not notice the step": Mutant(
        "dendrite_kernels/_adam.py",
        "    torch.autograd.graph.increment_version(weight)\n",
        "",
        "tests/nn/test_step_in_kernel.py",
    ),
    "optim: an older gradient is accumulated": Mutant(
        "dendrite_kernels/_adam.py",
        "if weight.grad is not None or weight.dtype not in",
        "if weight.dtype not in",
        "tests/nn/test_step_in_kernel.py",
    ),
    "optim: biases decay": Mutant(
        "dendrite_kernels/optim.py", "if p.dim() >= 2]", "if p.dim() >= 1]",
        "tests/nn/test_optim.py",
    ),
}  # fmt: skip

_TREE = "tests/nn/test_tree.py"

TREE = {
    "tree: the activation comes before the synapses of a level": Mutant(
        "dendrite_kernels/tree.py",
        'soma_activation=phi if synapses is None else "identity",',
        "soma_activation=phi,",
        _TREE,
    ),
    "tree: somas have the activation of branches": Mutant(
        "dendrite_kernels/tree.py",
        "return self.soma_activation or self.activation",
        "return self.activation",
        _TREE,
    ),
    "tree: levels above the first have no bias": Mutant(
        "dendrite_kernels/tree.py",
        "a = functional.sparse_linear(a, cable, bias, children)",
        "a = functional.sparse_linear(a, cable, None, children)",
        _TREE,
    ),
}

_PLANNER = "tests/backends/test_cuda_planner.py"

LAUNCHES = {
    "CUDA planner: no room for the row of zeros": Mutant(
        "dendrite_kernels/backends/cuda/plan.py",
        "return (work.gathered + 1) * kind.samples * work.itemsize",
        "return work.gathered * kind.samples * work.itemsize",
        _PLANNER,
    ),
    "CUDA planner: sign bits of one dendrite too many are staged": Mutant(
        "dendrite_kernels/backends/cuda/plan.py",
        "0 < work.sign_rows <= 65536",
        "0 < work.sign_rows <= 65537",
        _PLANNER,
    ),
    "CUDA packing: 16 bits cannot name the row of zeros": Mutant(
        "dendrite_kernels/backends/cuda/pack.py",
        "gathered + has_pads <= 65536",
        "gathered <= 65536",
        _PLANNER,
    ),
}

MUTANTS = CONNECTIVITY | AUTOGRAD | STATE | PLASTICITY | TREE | LAUNCHES
