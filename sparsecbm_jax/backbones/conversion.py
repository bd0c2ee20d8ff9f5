"""Conversion of checkpoints of any format to safetensors, tensor by tensor: many hosts then read files without pickles.

A safetensors file is the length of its header in eight bytes, the header, which says in JSON where each tensor lies,
and the tensors one after another. So one tensor can be written without the others in memory.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsecbm_jax.backbones.checkpoint_readers import Reader, SafetensorsReader, WeightsError, open_checkpoint
from sparsecbm_jax.backbones.pretrained import find_checkpoint

MAX_SHARD_BYTES = 5_000_000_000
# Copied with the weights, where they exist.
CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


class _Entry(NamedTuple):
    """A tensor's entry in the header."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Converted(NamedTuple):
    """The result of a conversion.

    Attributes:
        num_tensors: Number of tensors, with those of heads.
        num_bytes: Bytes of their values.
        dtypes: Their precisions.
        files: Names of the files of weights.
        others: Names of the files that were copied.
    """

    num_tensors: int
    num_bytes: int
    dtypes: tuple[str, ...]
    files: tuple[str, ...]
    others: tuple[str, ...]


def convert(
    name_or_dir: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_bytes: Callable[[int, int], object] = lambda num_bytes, total: None,
) -> Converted:
    """Writes a checkpoint as safetensors, in its own precision, with its configuration and tokeniser.

    The host holds one tensor at a time, and two to compare them; of msgpack checkpoints, one file. Afterwards every
    tensor is read from both checkpoints; only if all are equal does the directory get its name.

    Args:
        name_or_dir: A directory of the hub's layout, or a name on the hub.
        directory: The directory to make; it must not exist.
        max_shard_bytes: Most bytes of values in a file; a larger tensor has a file for itself.
        on_bytes: Called with the bytes that have just been written or compared, and the total of both.

    Returns:
        Counts, precisions and file names.

    Raises:
        WeightsError: The checkpoint cannot be read, a tensor has a type that safetensors does not have, or a written
            tensor differs from its source.
        FileExistsError: `directory` exists.
        OSError: The checkpoint is not found, or the disk has too little space for it.
    """
    target = Path(directory).expanduser().absolute()
    if target.exists():
        raise FileExistsError(f"{target} exists already; expected a name that is free")
    source = find_checkpoint(name_or_dir, also=(*CONFIG_FILES, *TOKENIZER_FILES))
    if not (source / "config.json").is_file():
        raise WeightsError(f"{source}: holds no config.json")
    reader = open_checkpoint(source)
    entries = [_entry(source, reader, name) for name in reader.shapes]
    total = sum(entry.num_bytes for entry in entries)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < total:
        raise OSError(f"{target.parent}: has {free / 1e9:.1f} GB free; the weights need {total / 1e9:.1f} GB")
    shards = _shards(entries, max_shard_bytes)
    partial = target.with_name(f".{target.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        for file_name, shard in shards.items():
            _write(partial / file_name, shard, reader, lambda num_bytes: on_bytes(num_bytes, 2 * total))
        if len(shards) > 1:
            weight_map = {entry.name: file_name for file_name, shard in shards.items() for entry in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        others = [name for name in (*CONFIG_FILES, *TOKENIZER_FILES) if (source / name).is_file()]
        for name in others:
            shutil.copyfile(source / name, partial / name)
        _compare(
            reader,
            SafetensorsReader([partial / name for name in shards]),
            entries,
            lambda num_bytes: on_bytes(num_bytes, 2 * total),
        )
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    dtypes = tuple(sorted({entry.dtype.name for entry in entries}))
    return Converted(len(entries), total, dtypes, tuple(shards), tuple(others))


def _entry(source: Path, reader: Reader, name: str) -> _Entry:
    entry = _Entry(name, tuple(reader.shapes[name]), reader.dtype(name))
    if entry.dtype.name not in _TYPES:
        raise WeightsError(f"{source}: {name!r} is {entry.dtype}; expected one of {', '.join(_TYPES)}")
    return entry


def _shards(entries: Sequence[_Entry], max_bytes: int) -> Mapping[str, list[_Entry]]:
    """Distributes entries over files, in their order, as a source without random access needs it."""
    shards: list[list[_Entry]] = [[]]
    free = max_bytes
    for entry in entries:
        if entry.num_bytes > free and shards[-1]:
            shards.append([])
            free = max_bytes
        shards[-1].append(entry)
        free -= entry.num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, start=1)
    }


def _write(path: Path, entries: Sequence[_Entry], reader: Reader, on_bytes: Callable[[int], object]) -> None:
    # transformers asks for the format.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.num_bytes
        header[entry.name] = {
            "dtype": _TYPES[entry.dtype.name],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for entry in entries:
            _bits(reader.read_whole(entry.name)).tofile(file)
            on_bytes(entry.num_bytes)


def _bits(array: np.ndarray) -> np.ndarray:
    """Returns the values in C order as they lie in memory, which is little-endian wherever JAX runs."""
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")


def _compare(source: Reader, written: Reader, entries: Sequence[_Entry], on_bytes: Callable[[int], object]) -> None:
    if set(written.shapes) != {entry.name for entry in entries}:
        raise WeightsError("the written files have other tensors than the source; is the disk sound?")
    for entry in entries:
        before, after = source.read_whole(entry.name), written.read_whole(entry.name)
        is_described = (after.shape, after.dtype) == (entry.shape, entry.dtype)
        if not is_described or not np.array_equal(_bits(before), _bits(after)):
            raise WeightsError(f"{entry.name!r} reads differently from what was written; is the disk sound?")
        on_bytes(entry.num_bytes)
