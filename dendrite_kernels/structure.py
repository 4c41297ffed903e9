"""Which inputs each dendrite sees and which dendrites each soma owns: block-structured CSR.

A `Connectivity` is an immutable description of sparse structure. It knows no rule that draws one
(`dendrite_kernels.connectivity` does) and no backend that computes with it: backends keep what
they derive from it in its per-object cache.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex, TypeVar

import numpy as np
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from . import _combine, _npz, edges
from ._pattern import of_mask, of_scipy, to_mask, to_scipy
from ._validate import (
    SIZE_LIMIT,
    Array,
    Duplicates,
    check_size,
    column_array,
    constant_step,
    image_shape,
    integers,
    pointer_array,
    soma_pointer,
)
from .labels import Labels, checked, shortened
from .transposed import TransposedPlan, build_transposed_plan, choose_block_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .nn import DendriticLayer, SparseLinear

T = TypeVar("T")

RANK_ALONG_FIELDS = "rank along fields"  # a key of `cached`, see backends._order
_ARRAYS = ("crow_indices", "col_indices", "soma_ptr")
_MISSING: Any = object()  # no value of a cache


class Connectivity:
    """Block-structured CSR: R dendrites over N inputs; consecutive dendrites form S somas.

    Immutable, validated once, inputs copied. Treat the index tensors as read-only too.

    Two connectivities are equal (and hash alike) if they connect the same inputs, dendrites and
    somas. `in_shape` only says which image the inputs are and takes no part in that. Nor do
    `labels`, which only name them; state dicts do not hold labels.

    Args:
        crow_indices: [R + 1] integers from 0 to nnz, not decreasing; row r owns
            col_indices[crow_indices[r]:crow_indices[r + 1]].
        col_indices: [nnz] integers in [0, N), strictly increasing in a row; rows may be empty.
        soma_ptr: [S + 1] integers from 0 to R, not decreasing; soma s owns dendrites
            soma_ptr[s]:soma_ptr[s + 1], possibly none.
        in_features: N.
        in_shape: (H, W) or (H, W, C) with product N, if the inputs are an image.
        channels_first: in_shape is (C, H, W), as images are in torch: input c * H * W + row * W +
            column. Otherwise channels come last: input (row * W + column) * C + c.
        labels: names of the N inputs, R dendrites and S somas: three sequences or Nones.

    Raises:
        TypeError: an index array or a size is not of an integer type.
        ValueError: a size, pointer or column breaks the rules above; names the first offender.
    """

    in_features: int  # N
    num_dendrites: int  # R
    num_somas: int  # S
    nnz: int
    density: float  # nnz / (R * N)
    in_shape: tuple[int, ...] | None
    channels_first: bool
    labels: Labels | None
    fan_in: int | None  # synapses of every dendrite, None if that varies
    dendrites_per_soma: int | None  # dendrites of every soma, None if that varies
    is_dense: bool
    crow_indices: torch.Tensor  # int32 [R + 1]
    col_indices: torch.Tensor  # int32 [nnz]
    soma_ptr: torch.Tensor  # int32 [S + 1]
    derived: dict[Hashable, Any]  # what `cached` has made, by key
    _locks: dict[int, threading.RLock]  # by process

    def __init__(
        self,
        crow_indices: Any,
        col_indices: Any,
        soma_ptr: Any,
        in_features: SupportsIndex,
        in_shape: Sequence[int] | None = None,
        channels_first: bool = False,
        labels: Sequence[Sequence[Hashable] | None] | None = None,
    ) -> None:
        n = check_size("in_features", in_features)
        col = integers("col_indices", col_indices)
        if col.size >= SIZE_LIMIT:
            raise ValueError(f"Expected fewer than 2**31 synapses, got {col.size}")
        crow = pointer_array("crow_indices", crow_indices, "row", col.size, "length of col_indices")
        col = column_array(col, crow, n)
        soma = pointer_array("soma_ptr", soma_ptr, "soma", crow.size - 1, "number of dendrites")
        rows, somas = crow.size - 1, soma.size - 1
        values: dict[str, Any] = {
            "in_features": n,
            "num_dendrites": rows,
            "num_somas": somas,
            "nnz": col.size,
            "density": col.size / (rows * n),
            "in_shape": image_shape(in_shape, n, channels_first),
            "channels_first": bool(channels_first),
            "labels": checked(labels, (n, rows, somas)),
            "fan_in": constant_step(crow),
            "dendrites_per_soma": constant_step(soma),
            "is_dense": col.size == rows * n,
            **dict(zip(_ARRAYS, _tensors(crow, col, soma), strict=True)),
            "derived": {},
            "_locks": {},
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_csr(
        cls,
        crow: Any,
        col: Any,
        in_features: SupportsIndex,
        soma_ptr: Any = None,
        dendrites_per_soma: SupportsIndex | None = None,
        in_shape: Sequence[int] | None = None,
        channels_first: bool = False,
    ) -> Connectivity:
        """From CSR arrays (lists, numpy arrays or tensors): see the class for shapes and errors.

        Give `soma_ptr` [S + 1], or `dendrites_per_soma` (a divisor of R), or neither, for one
        dendrite per soma.
        """
        rows = max(integers("crow_indices", crow).size - 1, 0)
        soma_ptr = soma_pointer(rows, soma_ptr, dendrites_per_soma)
        return cls(crow, col, soma_ptr, in_features, in_shape, channels_first)

    @classmethod
    def from_scipy(
        cls,
        m: Any,
        soma_ptr: Any = None,
        dendrites_per_soma: SupportsIndex | None = None,
        in_shape: Sequence[int] | None = None,
        channels_first: bool = False,
        *,
        duplicates: Duplicates = "refuse",
    ) -> Connectivity:
        """From the pattern of a scipy.sparse matrix [R, N], whose values are ignored.

        Every stored entry is a synapse, a stored zero too (but scipy drops those of DIA matrices).
        Indices may be unsorted. An entry that is stored twice is refused, or one synapse with
        duplicates="sum", as in `from_edges`; values that cancel leave a synapse too.

        Raises:
            TypeError: not a scipy.sparse matrix or array.
            ValueError: not two-dimensional, or an entry is stored twice.
        """
        pattern = of_scipy(m, duplicates)
        return cls.from_csr(*pattern, soma_ptr, dendrites_per_soma, in_shape, channels_first)

    @classmethod
    def from_mask(
        cls,
        mask: Any,
        soma_ptr: Any = None,
        dendrites_per_soma: SupportsIndex | None = None,
        in_shape: Sequence[int] | None = None,
        channels_first: bool = False,
        *,
        in_features: SupportsIndex | None = None,
    ) -> Connectivity:
        """From a boolean mask [R, N] (tensor, numpy array, lists): True where a synapse is.

        A row is a dendrite, a column an input, as in the weight of torch.nn.Linear. Kernels in
        Keras are [N, R]; transpose their masks. Given `in_features`, N is checked.
        """
        pattern = of_mask(mask, in_features)
        return cls.from_csr(*pattern, soma_ptr, dendrites_per_soma, in_shape, channels_first)

    @classmethod
    def from_edges(
        cls,
        pre: Any,
        dendrite: Any = None,
        soma: Any = None,
        weight: Any = None,
        *,
        inputs: int | Iterable[Hashable] | None = None,
        duplicates: Duplicates = "refuse",
        in_shape: Sequence[int] | None = None,
        channels_first: bool = False,
    ) -> Any:
        """From a table with one row for each synapse, whose labels it keeps.

        Labels are ints, strings or other hashables, in lists, arrays, tensors or Series. Dendrites
        and somas are numbered in order of appearance, soma by soma.

        Args:
            pre: [rows] the input of each synapse. Or all columns at once: a dict, a pandas or
                polars DataFrame with columns "pre", "dendrite" and maybe "soma" and "weight"
                (others are ignored), or a networkx DiGraph, whose edge u -> v is a synapse of
                dendrite v on input u; edges may have the attribute "weight", their targets "soma".
            dendrite: [rows] its dendrite.
            soma: [rows] its soma; default: every dendrite is its own soma.
            weight: [rows] its weight.
            inputs: N, if `pre` are positions from 0 to N - 1; or the labels of all inputs in their
                order; default: the labels in `pre` in order of appearance.
            duplicates: "refuse" a second synapse of a dendrite on an input, or "sum" them.
            in_shape, channels_first: as in the class.

        Returns:
            The Connectivity. With weights, (connectivity, weight), these as a new tensor [nnz]
            in the order of col_indices, float32 or float64 as given; integers and lists get torch's
            default dtype.

        Raises:
            TypeError, ValueError: columns of unequal lengths, a missing or unknown label, a
                dendrite in two somas; names the first offender.
        """
        table = edges.table_of(pre, dendrite, soma, weight)
        network = edges.network(table, inputs, duplicates)
        c = cls(
            network.crow,
            network.columns,
            network.soma_ptr,
            network.in_features,
            in_shape,
            channels_first,
            network.labels,
        )
        return c if network.weight is None else (c, network.weight)

    @staticmethod
    def stack(networks: Iterable[Connectivity]) -> Connectivity:
        """Several networks on the same inputs as one: their dendrites and somas in order.

        `in_shape` and the labels of inputs are kept if all agree on them, the labels of dendrites
        and somas if all have them.

        Raises:
            ValueError: no network, or in_features differ.
        """
        return _combine.stack(networks, Connectivity)

    @staticmethod
    def block_diagonal(networks: Iterable[Connectivity]) -> Connectivity:
        """Several networks side by side, each on its own inputs; `in_shape` is dropped.

        Labels are kept where all have them.

        Raises:
            ValueError: no network.
        """
        return _combine.block_diagonal(networks, Connectivity)

    def grow(self, new: Connectivity) -> Connectivity:
        """With the dendrites of another network on the same inputs, at the end of each soma.

        Soma s then owns its own dendrites, in order, and after them those of soma s of `new`:
        dendrite j of soma s of `new` becomes dendrite j + soma_ptr[s + 1]. `in_shape` and the
        labels of inputs and somas stay, those of dendrites if both networks have them.

        Raises:
            TypeError: not a Connectivity.
            ValueError: another number of inputs or somas, or 2**31 synapses or dendrites.
        """
        return _combine.grow(self, new)

    def to_scipy(self, data: Any = None) -> Any:
        """A `scipy.sparse.csr_array` [R, N] with values `data` [nnz] (default: float32 ones).

        Raises:
            ImportError: scipy is missing.
            ValueError: data of another shape.
        """
        return to_scipy(self, data)

    def to_mask(self) -> torch.Tensor:
        """The dense boolean mask [R, N]: True where a synapse is."""
        return torch.from_numpy(to_mask(self))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to an uncompressed .npz file at exactly `path`; a reader never sees half a file.

        Raises:
            TypeError: a label is neither a str nor an int.
        """
        _npz.write(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Connectivity:
        """Read what `save` wrote; validates again and never unpickles.

        Raises:
            OSError: the file cannot be opened.
            ValueError: not such a file, damaged, or of a newer format version.
        """
        return _npz.read(path, Connectivity)

    def cached(self, key: Hashable, factory: Callable[[], T]) -> T:
        """What a backend keeps for this object under `key`, made by `factory()` at the first call.

        Thread-safe; not pickled or compared. `factory` runs under this object's lock, so it must
        not wait for another thread that calls `cached`.
        """
        value: T = self.derived.get(key, _MISSING)
        if value is _MISSING:
            # A lock for each process: a thread that held it at a fork never gives it back there.
            # Re-entrant: a factory may ask for another cached value, and a signal handler that runs
            # meanwhile for the same one; whose address may be in use, so the first one stays.
            with self._locks.setdefault(os.getpid(), threading.RLock()):
                if key not in self.derived:
                    self.derived.setdefault(key, untraced(factory))
                value = self.derived[key]
        return value

    @property
    def columns(self) -> Array:
        """Columns for kernels, read-only [nnz]: uint16 if in_features <= 65536, else int32."""
        return self.cached("columns", self._make_columns)

    def _make_columns(self) -> Array:
        columns: Array = self.col_indices.numpy()
        columns = columns.astype(np.uint16) if self.in_features <= 65536 else columns.view()
        columns.flags.writeable = False
        return columns

    @property
    def transposed(self) -> TransposedPlan:
        """The synapses grouped by input column within blocks of dendrites, for backward.

        Made when first asked for; blocks suit the number of threads that torch has then.
        """
        return self.cached("transposed", self._make_transposed)

    def _make_transposed(self) -> TransposedPlan:
        rows = choose_block_rows(
            self.num_dendrites, self.in_features, self.nnz, torch.get_num_threads()
        )
        return build_transposed_plan(self.crow_indices.numpy(), self.columns, rows)

    @property
    def digest(self) -> str:
        """Hexadecimal digest of the structure (not of in_shape), the same in every process."""
        return self.cached("digest", self._make_digest)

    def _make_digest(self) -> str:
        digest = hashlib.blake2b(str(self.in_features).encode(), digest_size=16)
        for tensor in (self.crow_indices, self.col_indices, self.soma_ptr):
            array = tensor.numpy().astype("<i4", copy=False)
            digest.update(array.size.to_bytes(8, "little"))  # so that no two networks read alike
            digest.update(array.data)
        return digest.hexdigest()

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"Connectivity is immutable, cannot set {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"Connectivity is immutable, cannot delete {name!r}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Connectivity):
            return NotImplemented
        return self is other or (
            self.in_features == other.in_features
            and torch.equal(self.crow_indices, other.crow_indices)
            and torch.equal(self.soma_ptr, other.soma_ptr)
            and torch.equal(self.col_indices, other.col_indices)
        )

    def __hash__(self) -> int:
        return int(self.digest[:15], 16)

    def __copy__(self) -> Connectivity:
        return self  # immutable: copies of a layer share it, its plan and its device caches

    def __deepcopy__(self, memo: dict[int, Any]) -> Connectivity:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # torch.load(weights_only=True) takes no numpy arrays; tensors cost spawned processes files.
        arrays = [getattr(self, name).numpy().tobytes() for name in _ARRAYS]
        labels = None if self.labels is None else tuple(self.labels)
        return _from_bytes, (*arrays, self.in_features, self.in_shape, self.channels_first, labels)

    def __repr__(self) -> str:
        labels = "" if self.labels is None else f", labels=({shortened(self.labels)})"
        return (
            f"Connectivity(in_features={self.in_features}, num_dendrites={self.num_dendrites}, "
            f"num_somas={self.num_somas}, nnz={self.nnz}, density={self.density:.3g}, "
            f"fan_in={self.fan_in}, dendrites_per_soma={self.dendrites_per_soma}, "
            f"in_shape={self.in_shape}{', channels_first=True' if self.channels_first else ''}"
            f"{labels})"
        )

    def plot(
        self,
        somas: Iterable[int] | None = None,
        *,
        image: Any = None,
        figure: Figure | None = None,
        weights: DendriticLayer | SparseLinear | torch.Tensor | None = None,
        ax: Axes | None = None,
    ) -> Figure:
        """Draw the receptive fields of some somas, or the synapses as a matrix.

        With an in_shape: a panel for each soma, a colour for each dendrite. Every synapse is one
        mark; dendrites that share a pixel split it between them. A pixel is marked if the dendrite
        sees any of its channels; with weights, each channel's synapse is a mark.

        Without: a row for each dendrite, soma by soma, and a column for each input, with `labels`
        where there is room. Where there would be more than 100 to the inch, a cell stands for
        several: it shows which share of them are synapses, or the weight of largest size.

        Args:
            somas: which ones; default: the first eight (the first one in `ax`), all in a matrix.
            image: [H, W] or [H, W, C] to show in grey underneath.
            figure: draw into this one, say `plt.figure()`; default: a new one unknown to pyplot.
            weights: colour synapses by weight, red above 0 and blue below, with a colour bar: a
                layer on this connectivity, or [nnz] numbers in the order of col_indices. Colours
                reach to the largest size of all weights, also of those not drawn.
            ax: draw one soma, or the matrix, into these axes. Their figure should have
                layout="constrained", which makes room for names and the colour bar.

        Returns:
            The figure drawn into; with `ax`, the one that holds it.

        Raises:
            ImportError: matplotlib is missing.
            TypeError, ValueError: no such soma, or several in `ax`; weights of another layer,
                dtype or shape, or not finite; `figure` and `ax`; an image without an in_shape.
        """
        from ._plot import plot

        return plot(self, somas, image, figure, weights, ax)


def _from_bytes(crow: bytes, col: bytes, soma_ptr: bytes, *others: Any) -> Connectivity:
    """What a pickle calls."""
    crow_array, col_array, soma_array = (np.frombuffer(b, np.int32) for b in (crow, col, soma_ptr))
    return Connectivity(crow_array, col_array, soma_array, *others)


# For torch.load(weights_only=True). Not the class: a file could then set attributes unchecked.
torch.serialization.add_safe_globals([_from_bytes])


def _tensors(*arrays: Array) -> list[torch.Tensor]:
    """Ordinary tensors: those of torch.inference_mode may not be saved for backward, those of
    FakeTensorMode hold no values.
    """
    with torch.inference_mode(False), unset_fake_temporarily():
        return [torch.from_numpy(array) for array in arrays]


def untraced(factory: Callable[[], T]) -> T:
    """factory(), where torch.compile does not look.

    A call from a frame that the compiler gave up on is a frame that it tries in turn, and numpy
    code that it takes for torch code comes out wrong.
    """
    dynamo = sys.modules.get("torch._dynamo")  # importing it takes a second
    if dynamo is None:
        return factory()
    value: T = dynamo.disable(lambda: factory())()  # of a class it would be a changed class
    return value
