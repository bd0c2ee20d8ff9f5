"""Checkpoints of every format become safetensors of the same values, or nothing at all."""

import json
from collections.abc import Callable
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization, traverse_util
from safetensors.numpy import load_file, save_file

from sparsecbm_jax.backbones import (
    WeightsError,
    config_from_hf,
    conversion,
    convert,
    export_pretrained,
    load_pretrained,
)
from sparsecbm_jax.backbones.conversion import _write

from tests.support import backbone_cases as cases
from tests.support.mains import run_main

Tensors = dict[str, np.ndarray]


def save_torch(tensors: Tensors, path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({key: torch.tensor(value.astype(np.float32)).bfloat16() for key, value in tensors.items()}, path)


def save_msgpack(tensors: Tensors, path: Path) -> None:
    flat = {}
    for key, value in tensors.items():
        *modules, leaf = key.split(".")
        if leaf == "weight":
            leaf = "scale" if value.ndim == 1 else "embedding" if "embed" in modules[-1] else "kernel"
        flat[(*modules, leaf)] = value.T if leaf == "kernel" else value
    path.write_bytes(serialization.to_bytes(traverse_util.unflatten_dict(flat)))


# How a format is written, and which precision it keeps here.
FORMATS: dict[str, tuple[Callable[[Tensors, Path], None], type]] = {
    "pytorch_model.bin": (save_torch, jnp.bfloat16),
    "flax_model.msgpack": (save_msgpack, np.float16),
    "model.safetensors": (save_file, np.float32),
}


def checkpoint(directory: Path, name: str, num_files: int) -> Path:
    """A tiny OPT in one format; returns its directory."""
    config = config_from_hf(cases.HF_CONFIGS["opt-350m"])
    export_pretrained(directory, config, cases.random_params(config))
    (directory / "vocab.json").write_text("{}")
    (directory / "README.md").write_text("not to be copied")
    save, dtype = FORMATS[name]
    tensors = {key: value.astype(dtype) for key, value in load_file(directory / "model.safetensors").items()}
    (directory / "model.safetensors").unlink()
    if num_files == 1:
        save(tensors, directory / name)
        return directory
    weight_map = {}
    stem, _, suffix = name.partition(".")
    for number in range(num_files):
        part = f"{stem}-{number + 1:05d}-of-{num_files:05d}.{suffix}"
        keys = list(tensors)[number::num_files]
        save({key: tensors[key] for key in keys}, directory / part)
        weight_map |= dict.fromkeys(keys, part)
    (directory / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.mark.parametrize("num_files", [1, 2], ids=["one file", "two files"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_loads_to_the_same_parameters(name: str, num_files: int, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", name, num_files)
    result = convert(source, tmp_path / "out", max_shard_bytes=12_000 if num_files > 1 else 10**9)
    assert result.dtypes == (np.dtype(FORMATS[name][1]).name,)
    assert (len(result.files) > 2) == (num_files > 1)
    assert result.others == ("config.json", "vocab.json")
    index = {"model.safetensors.index.json"} if num_files > 1 else set()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*result.files, *result.others} | index
    assert all(path.stat().st_size < 20_000 for path in (tmp_path / "out").glob("*.safetensors")) == (num_files > 1)
    (before_config, before), (after_config, after) = load_pretrained(source), load_pretrained(tmp_path / "out")
    assert before_config == after_config
    chex.assert_trees_all_equal(before, after)


def test_files_are_as_safetensors_writes_them(tmp_path: Path) -> None:
    tensors = {
        "half": np.arange(6).reshape(2, 3).astype(np.float16),
        "bits": np.array([True, False, True]),
        "scalar": np.array(7, np.int64),
        "brain": np.linspace(0, 1, 5).astype(jnp.bfloat16),
    }
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    convert(tmp_path / "source", tmp_path / "out")
    chex.assert_trees_all_equal(load_file(tmp_path / "out" / "model.safetensors"), tensors)


def test_nothing_is_overwritten_and_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "model.safetensors", 1)
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match="taken exists already"):
        convert(source, tmp_path / "taken")
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(WeightsError, match="is not a whole safetensors file"):
        convert(source, tmp_path / "out")
    (source / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"source: holds no weights; expected one of model\.safetensors"):
        convert(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "taken"}


def test_what_reads_differently_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint(tmp_path / "source", "model.safetensors", 1)
    real = _write

    def damage(path: Path, *arguments: object) -> None:
        real(path, *arguments)  # type: ignore[arg-type]
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    monkeypatch.setattr(conversion, "_write", damage)
    with pytest.raises(WeightsError, match="reads differently from what was written"):
        convert(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_the_main_says_what_it_wrote(tmp_path: Path) -> None:
    checkpoint(tmp_path / "source", "model.safetensors", 1)
    result = run_main("convert.py", "--model=source", "--save=out", "--max_shard_gb=2e-5", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "float32" in result.stdout and "compared with the source\ncopied config.json, vocab.json" in result.stdout
    again = run_main("convert.py", "--model=source", "--save=out", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert "out exists already; expected a name that is free" in again.stderr
    absent = run_main("convert.py", "--model=./absent", "--save=other", cwd=tmp_path)
    assert (absent.returncode, absent.stderr) == (2, "error: ./absent: no such directory\n")
