"""A whole model in a directory: save it, load it back to the bit, predict with it.

    config.json          what the model is: shapes, schema, strategy, sparsity, seed
    model.safetensors    parameters ('params/...') and heads ('heads/...')
    masks.safetensors    the K masks, eight weights a byte; absent for a dense model
    tokenizer.json, ...  the tokeniser
    metrics.json         scores
    README.md            model card

Each file is written beside and renamed, `config.json` last. Nothing is pickled.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparsecbm_jax.backbones import BackboneConfig, init_params, maskable_paths
from sparsecbm_jax.config.names import did_you_mean
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core import sharding
from sparsecbm_jax.core.masks import Masks
from sparsecbm_jax.core.trees import path_string
from sparsecbm_jax.data.schema import Schema
from sparsecbm_jax.data.tokenizers import load_tokenizer
from sparsecbm_jax.model import card
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.heads import init_heads
from sparsecbm_jax.model.mean_activations import read_mean_activations
from sparsecbm_jax.model.reliability import read_reliability
from sparsecbm_jax.model.sparse_cbm import SparseCBM
from sparsecbm_jax.model.strategies import STRATEGIES
from sparsecbm_jax.runtime.json_files import read_json_object
from sparsecbm_jax.version import __version__

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
MASKS_FILE = "masks.safetensors"
METRICS_FILE = "metrics.json"
CARD_FILE = "README.md"


_KEYS = (
    "format_version",
    "library_version",
    "strategy",
    "model",
    "schema",
    "sparsity",
    "max_length",
    "metadata",
)
_KINDS = {"model": (dict,), "schema": (dict,), "sparsity": (dict, NoneType), "max_length": (int,), "metadata": (dict,)}
_MAX_LISTED = 20


class ArtifactError(ValueError):
    """A directory that does not hold a whole model of this format."""


def _named(tree: Any) -> dict[str, Any]:
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _abstract(config: CBMConfig, strategy: str) -> dict[str, Any]:
    """Returns shapes and dtypes of the whole model, without making it."""
    rng, has_bottleneck = jax.random.key(0), STRATEGIES[strategy].has_bottleneck
    return {
        "params": jax.eval_shape(lambda: init_params(rng, config.backbone)),
        "heads": jax.eval_shape(lambda: init_heads(rng, config, has_bottleneck=has_bottleneck)),
    }


def _check_leaves(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    def words(leaf: Any) -> str:
        return "nothing" if leaf is None else f"{list(leaf.shape)} {leaf.dtype}"

    problems = [
        f"{name}: found {words(found.get(name))}, expected {words(wanted.get(name))}"
        for name in sorted(set(found) | set(wanted))
        if words(found.get(name)) != words(wanted.get(name))
    ]
    if problems:
        more = [f"and {len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
        raise ArtifactError(
            f"{where} does not fit the model's config:\n  " + "\n  ".join(problems[:_MAX_LISTED] + more)
        )


def _check_schema(config: CBMConfig, schema: Schema, strategy: str, where: str) -> None:
    if strategy not in STRATEGIES:
        raise ArtifactError(f"{where}: strategy is {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    for name in ("num_concepts", "num_classes", "num_labels"):
        of_config, of_schema = getattr(config, name), getattr(schema, name)
        if of_config != of_schema and (STRATEGIES[strategy].has_bottleneck or name == "num_labels"):
            raise ArtifactError(f"{where}: the model has {name} = {of_config}, but its schema {of_schema}")


def _check_masks(config: CBMConfig, shapes: Mapping[str, Sequence[int]], wanted: Mapping[str, Any], where: str) -> None:
    known = maskable_paths(config.backbone)
    for path, shape in shapes.items():
        if path not in known:
            raise ArtifactError(f"{where} has a mask for {path!r}, which is no maskable kernel{_or_known(path, known)}")
        expected = [config.num_concepts, *wanted[f"params/{path}"].shape]
        if list(shape) != expected:
            raise ArtifactError(f"{where}: the mask of {path} is {list(shape)}, expected {expected}")


def save(model: SparseCBM, directory: str | Path, *, metrics: Mapping[str, Any] | None = None) -> Path:
    """Saves a model to a directory, which `load` reads back to the bit.

    Several processes: all call it, process 0 writes.

    Args:
        model: the model.
        directory: where to; made where it does not exist, and an older model in it is replaced.
        metrics: scores for `metrics.json` and the card; by default `model.metadata["metrics"]`; where there are none,
            an older model's `metrics.json` goes.

    Returns:
        The directory.

    Raises:
        ArtifactError: the parts of the model do not fit each other, or the directory holds files of something else;
            nothing is written.
        TypeError: the metadata or the metrics are not JSON; nothing is written.
    """
    directory = Path(directory)
    _check_schema(model.config, model.schema, model.strategy, "the model to save")
    wanted = _named(_abstract(model.config, model.strategy))
    tensors = {
        name: sharding.to_host(leaf) for name, leaf in _named({"params": model.params, "heads": model.heads}).items()
    }
    _check_leaves(tensors, wanted, "the model to save")
    masks: Any = None if model.masks is None else {path: sharding.to_host(mask) for path, mask in model.masks.items()}
    if masks is not None:
        _check_masks(model.config, {path: mask.shape for path, mask in masks.items()}, wanted, "the model to save")
    if jax.process_index() != 0:
        return directory
    metadata = dict(model.metadata)
    metrics = metrics if metrics is not None else metadata.get("metrics")
    metadata.pop("metrics", None)
    config = {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "strategy": model.strategy,
        "model": dataclasses.asdict(model.config),
        "schema": model.schema.to_dict(),
        "sparsity": None if masks is None else _sparsity(masks, model.schema),
        "max_length": model.max_length,
        "metadata": metadata,
    }
    texts = {CARD_FILE: card.render(directory.resolve().name, config, metrics or {})}
    if metrics is not None:
        texts[METRICS_FILE] = json.dumps(metrics, indent=2) + "\n"
    texts[CONFIG_FILE] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"

    foreign = [name for name in (CARD_FILE, METRICS_FILE, CONFIG_FILE) if (directory / name).exists()]
    if foreign and not (directory / MODEL_FILE).exists():
        raise ArtifactError(f"{directory} holds {foreign[0]}, but no saved model; expected an empty or a new folder")
    directory.mkdir(parents=True, exist_ok=True)
    beside = directory / f".saving-{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        model.tokenizer.save_pretrained(str(beside))
        save_file(tensors, beside / MODEL_FILE, {"format": "sparsecbm_jax"})
        if masks is not None:
            facts = {
                "shapes": {path: list(mask.shape) for path, mask in masks.items()},
                "num_concepts": model.config.num_concepts,
            }
            facts["fingerprint"] = masks_lib.fingerprint(masks)
            save_file(masks_lib.to_bits(masks), beside / MASKS_FILE, {"masks": json.dumps(facts)})
        for name, text in texts.items():
            (beside / name).write_text(text, encoding="utf-8")
        # The parameters go first: they show that the folder is a model's. config.json goes last: it names the masks
        # that belong to it, so that a half-replaced model is found out.
        order = {MODEL_FILE: 0, CONFIG_FILE: 2}
        for path in sorted(beside.iterdir(), key=lambda path: order.get(path.name, 1)):
            os.replace(path, directory / path.name)
        for name, is_absent in {MASKS_FILE: masks is None, METRICS_FILE: metrics is None}.items():
            if is_absent:
                (directory / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return directory


def _sparsity(masks: Any, schema: Schema) -> dict[str, Any]:
    densities = masks_lib.total_density(masks).tolist()
    return {
        "density": dict(zip(schema.concepts, densities, strict=True)),
        "num_weights": masks_lib.num_weights(masks),
        "fingerprint": masks_lib.fingerprint(masks),
    }


def load(directory: str | Path, *, mesh: Mesh | None = None) -> SparseCBM:
    """Loads a model that `save` wrote.

    Args:
        directory: the saved directory.
        mesh: devices to place the model on; each reads its own shards of the parameters. By default the first device.

    Returns:
        The model, with predictions equal to the bit to those of the model saved.

    Raises:
        ArtifactError: a file is missing, damaged or of a newer format, has unknown keys, or the parts do not fit each
            other; the message names the file and what was expected.
    """
    directory = Path(directory)
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise ArtifactError(
            f"{directory} {what}; expected the folder of a saved model, such as `model` in the workdir of "
            "`sparsecbm train`"
        )
    config, schema, content = _read_config(directory / CONFIG_FILE)
    strategy, sparsity = content["strategy"], content["sparsity"]
    abstract = _abstract(config, strategy)
    if mesh is not None:
        sharding.check_divisible(abstract, mesh)
    loaded = _load_tensors(directory / MODEL_FILE, abstract, mesh)
    masks = None
    if sparsity is not None:
        masks = _load_masks(directory / MASKS_FILE, config, _named(abstract), sparsity["fingerprint"], mesh)
    elif (directory / MASKS_FILE).exists():
        raise ArtifactError(f"{directory / MASKS_FILE} exists, but {CONFIG_FILE} says that the model is dense")
    metadata = {**content["metadata"], "max_length": content["max_length"]}
    if (directory / METRICS_FILE).is_file():
        metadata["metrics"] = _read_json(directory / METRICS_FILE)
    try:
        read_mean_activations(metadata, config.num_concepts, config.num_classes)
        read_reliability(metadata, config.num_concepts)
    except ValueError as error:
        raise ArtifactError(f"{directory / CONFIG_FILE}: {error}") from error
    tokenizer = load_tokenizer(directory)
    return SparseCBM(config, loaded["params"], masks, loaded["heads"], schema, tokenizer, strategy, metadata)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        inside = path.parent / "model"
        hint = f"; did you mean {inside}?" if (inside / path.name).is_file() else ""
        raise ArtifactError(f"{path} is missing; expected a directory that `sparsecbm_jax.save` wrote{hint}")
    return read_json_object(path, "what `sparsecbm_jax.save` wrote", error=ArtifactError)


def _or_known(name: str, known: Sequence[str]) -> str:
    return did_you_mean(name, known, "; did you mean {!r}?") or f"; known are {', '.join(known)}"


def _check_keys(content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in content:
        if key not in known:
            raise ArtifactError(f"{where}: unknown key {key!r}{_or_known(key, known)}")
    if absent := [key for key in known if key not in content]:
        raise ArtifactError(f"{where}: lacks {', '.join(absent)}")


def _read_config(path: Path) -> tuple[CBMConfig, Schema, dict[str, Any]]:
    content = _read_json(path)
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: format_version is {version!r}, expected {FORMAT_VERSION} "
            f"(written by sparsecbm_jax {content.get('library_version', 'unknown')}, this is {__version__})"
        )
    _check_keys(content, _KEYS, str(path))
    for key, kinds in _KINDS.items():
        if not isinstance(content[key], kinds):
            expected = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
            raise ArtifactError(f"{path}: {key} is {content[key]!r}, expected {expected}")
    if content["sparsity"] is not None and not isinstance(content["sparsity"].get("fingerprint"), str):
        raise ArtifactError(f"{path}: sparsity lacks the masks' fingerprint")
    if "activation" not in content["model"]:
        # A model of version 0.1.0.
        content["model"]["activation"] = "sigmoid"
    fields = [field.name for field in dataclasses.fields(CBMConfig)]
    _check_keys(content["model"], fields, f"{path}, model")
    try:
        backbone = BackboneConfig.from_dict(content["model"]["backbone"])
        config = CBMConfig(**{**content["model"], "backbone": backbone})
        schema = Schema.from_dict(content["schema"])
    except (TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path}: {error}") from error
    _check_schema(config, schema, content["strategy"], str(path))
    try:
        _abstract(config, content["strategy"])
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: model does not describe one: {error}") from error
    return config, schema, content


class _Leaf(NamedTuple):
    shape: tuple[int, ...]
    dtype: str


_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "U8": "uint8", "BOOL": "bool"}


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing")
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is truncated or is not a safetensors file: {error}") from error


def _load_tensors(path: Path, abstract: dict[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    with _open(path) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
        found = {n: _Leaf(tuple(s.get_shape()), _DTYPES.get(s.get_dtype(), s.get_dtype())) for n, s in slices.items()}
        _check_leaves(found, _named(abstract), str(path))

        def place(key_path: Any, leaf: Any) -> jax.Array:
            name = path_string(key_path)
            if mesh is None:
                return jnp.asarray(tensors.get_tensor(name))
            spec = sharding.spec_for(name, len(leaf.shape))
            return jax.make_array_from_callback(
                leaf.shape, NamedSharding(mesh, spec), lambda index: slices[name][index]
            )

        return jax.tree_util.tree_map_with_path(place, abstract)


def _load_masks(path: Path, config: CBMConfig, wanted: Mapping[str, Any], fingerprint: str, mesh: Mesh | None) -> Masks:
    with _open(path) as tensors:
        try:
            shapes = {name: tuple(shape) for name, shape in json.loads(tensors.metadata()["masks"])["shapes"].items()}
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{path} lacks the masks' shapes in its metadata; expected a file that `save` wrote"
            ) from error
        bits = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
    if set(bits) != set(shapes):
        raise ArtifactError(f"{path}: masks and shapes differ in {sorted(set(bits) ^ set(shapes))}")
    _check_masks(config, shapes, wanted, str(path))
    try:
        masks = masks_lib.from_bits(bits, shapes)
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}") from error
    if masks_lib.fingerprint(masks) != fingerprint:
        raise ArtifactError(
            f"{path} does not hold the masks that {CONFIG_FILE} names (fingerprint {fingerprint[:12]}…)"
        )
    if mesh is None:
        return masks

    def place(name: str, mask: Array) -> Array:
        spec = PartitionSpec(None, *sharding.spec_for(name, mask.ndim - 1))
        return jax.device_put(mask, NamedSharding(mesh, spec))

    return {name: place(name, mask) for name, mask in masks.items()}
