"""Checkpoint files behind one small interface: the shape of every tensor, and any slice of one of them.

Tensors go by PyTorch's names and are laid out as PyTorch lays them out, whatever the format.
"""

import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsecbm_jax.runtime.json_files import read_json_object

Index = tuple[slice, ...]


class WeightsError(ValueError):
    """A checkpoint that cannot be read, or that does not fit the model."""


class Reader(abc.ABC):
    """Random access to the tensors of a checkpoint.

    Attributes:
        shapes: Shape of every tensor, by name, with the old 'LayerNorm.gamma' and '.beta' spelt 'weight' and 'bias'.
    """

    shapes: dict[str, tuple[int, ...]]

    @abc.abstractmethod
    def read(self, name: str, index: Index) -> np.ndarray:
        """Reads the values of one tensor at `index`, in the checkpoint's own precision."""

    def read_whole(self, name: str) -> np.ndarray:
        """Reads all values of one tensor."""
        return self.read(name, tuple(slice(None) for _ in self.shapes[name]))

    def dtype(self, name: str) -> np.dtype:
        """Reads the precision of one tensor."""
        return self.read(name, tuple(slice(0, 0) for _ in self.shapes[name])).dtype


def _spelling(name: str) -> str:
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name[: -len(old)] + new
    return name


def _sharded_files(index_file: Path) -> list[Path]:
    weight_map = read_json_object(index_file, "an index of shards", error=WeightsError).get("weight_map")
    if not isinstance(weight_map, Mapping):
        raise WeightsError(f"{index_file}: has no 'weight_map'")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise WeightsError(f"{index_file}: names {name!r}; expected the name of a file in the same directory")
    files = [index_file.parent / name for name in sorted(set(weight_map.values()))]
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise WeightsError(f"{index_file}: names files that are not in the directory: {', '.join(absent)}")
    return files


class SafetensorsReader(Reader):
    """A reader of safetensors files that reads only the bytes of the requested slices."""

    def __init__(self, files: list[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self.shapes = {}
        self._places: dict[str, tuple[Any, str]] = {}
        for path in files:
            try:
                handle = safe_open(path, framework="np")
            except SafetensorError as error:
                raise WeightsError(
                    f"{path}: is not a whole safetensors file (truncated, or not finished downloading?): {error}"
                ) from error
            for stored in handle.keys():  # noqa: SIM118 (not a mapping)
                self.shapes[_spelling(stored)] = tuple(handle.get_slice(stored).get_shape())
                self._places[_spelling(stored)] = handle, stored

    def read(self, name: str, index: Index) -> np.ndarray:
        """Reads the values of one tensor at `index`."""
        handle, stored = self._places[name]
        return handle.get_slice(stored)[index]


class TorchReader(Reader):
    """A reader of `pytorch_model.bin` through torch, memory-mapped, that executes none of the pickled code."""

    def __init__(self, files: list[Path]) -> None:
        try:
            import torch
        except ImportError as error:
            raise WeightsError(
                f"{files[0]}: reading PyTorch's format needs torch; install the extra 'torch' "
                "(pip install 'sparsecbm-jax[torch]'), or use a checkpoint in safetensors"
            ) from error
        self._torch = torch
        self.shapes = {}
        self._tensors: dict[str, Any] = {}
        for path in files:
            for stored, tensor in self._load(path).items():
                if isinstance(tensor, torch.Tensor):
                    self._tensors[_spelling(stored)] = tensor
                    self.shapes[_spelling(stored)] = tuple(tensor.shape)

    def _load(self, path: Path) -> Mapping[str, Any]:
        try:
            # Files written before PyTorch 1.6 are not zip archives and cannot be mapped.
            with path.open("rb") as file:
                is_zip = file.read(2) == b"PK"
            return self._torch.load(path, mmap=is_zip, weights_only=True, map_location="cpu")
        except Exception as error:
            raise WeightsError(f"{path}: cannot be read as PyTorch weights (truncated?): {error}") from error

    def read(self, name: str, index: Index) -> np.ndarray:
        """Reads the values of one tensor at `index`."""
        tensor = self._tensors[name][index].detach()
        if tensor.dtype == self._torch.bfloat16:
            # numpy has no bfloat16 of its own that torch could convert to, so the bits are passed on.
            return tensor.view(self._torch.int16).numpy().view(jnp.bfloat16)
        return tensor.numpy()


class MsgpackReader(Reader):
    """A reader of `flax_model.msgpack`; the format has no random access, so one file at a time is held in memory."""

    def __init__(self, files: list[Path]) -> None:
        self.shapes = {}
        self._places: dict[str, tuple[Path, str]] = {}
        self._open: tuple[Path, dict[str, np.ndarray]] | None = None
        for path in files:
            for stored, array in self._load(path).items():
                name = self._torch_name(stored)
                self.shapes[name] = array.shape[::-1] if self._is_kernel(stored) else array.shape
                self._places[name] = path, stored

    @staticmethod
    def _is_kernel(stored: str) -> bool:
        return stored.endswith("/kernel")

    @staticmethod
    def _torch_name(stored: str) -> str:
        *modules, leaf = stored.split("/")
        return ".".join([*modules, "weight" if leaf in ("kernel", "scale", "embedding") else leaf])

    def _load(self, path: Path) -> dict[str, np.ndarray]:
        if self._open is None or self._open[0] != path:
            from flax import serialization, traverse_util

            self._open = None
            try:
                tree = serialization.msgpack_restore(path.read_bytes())
                flat = traverse_util.flatten_dict(tree, sep="/")
            except Exception as error:
                raise WeightsError(f"{path}: cannot be read as Flax msgpack weights (truncated?): {error}") from error
            self._open = path, {name: np.asarray(array) for name, array in flat.items()}
        return self._open[1]

    def read(self, name: str, index: Index) -> np.ndarray:
        """Reads the values of one tensor at `index`."""
        path, stored = self._places[name]
        array = self._load(path)[stored]
        return (array.T if self._is_kernel(stored) else array)[index]


# In order of preference: the format with random access first, the one that needs torch last.
FORMATS: tuple[tuple[str, Callable[[list[Path]], Reader]], ...] = (
    ("model.safetensors", SafetensorsReader),
    ("flax_model.msgpack", MsgpackReader),
    ("pytorch_model.bin", TorchReader),
)


def open_checkpoint(directory: Path) -> Reader:
    """Opens the weights in a directory of the hub's layout, single files before sharded ones.

    Raises:
        WeightsError: There are none, or they cannot be read.
    """
    for name, reader in FORMATS:
        single, index_file = directory / name, directory / f"{name}.index.json"
        if single.is_file():
            return reader([single])
        if index_file.is_file():
            return reader(_sharded_files(index_file))
    expected = ", ".join(f"{name}[.index.json]" for name, _ in FORMATS)
    raise WeightsError(f"{directory}: holds no weights; expected one of {expected}")
