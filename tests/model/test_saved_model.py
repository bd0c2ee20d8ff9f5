"""Saved models: the same bits back, and every kind of damage named."""

import dataclasses
import json
import pickletools
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sparsecbm_jax
from sparsecbm_jax.backbones import BackboneConfig, init_params, maskable_paths
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core.sharding import make_mesh
from sparsecbm_jax.data.schema import DataError, Schema
from sparsecbm_jax.data.tokenizers import train_wordpiece
from sparsecbm_jax.model import card as card_lib
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.heads import init_heads
from sparsecbm_jax.model.predictions import predict
from sparsecbm_jax.model.saved_model import ArtifactError, load, save
from sparsecbm_jax.model.sparse_cbm import SparseCBM

# A text beside longer ones is padded further: float32 sums over more zeros, in another order.
COMPANY_TOLERANCE = 1e-5

TEXTS = (
    "the food was great but the room was loud",
    "service was slow",
    "a quiet place with kind waiters and the best soup that we had in the whole long week we were there , "
    "even if the bill was a little high for what they brought to the table at the end of it all",
    "noise noise noise",
    "we loved the ambiance and will come back for the food and the service",
)
SCHEMA = Schema(
    concepts=("food", "ambi|ance *", "service"),
    labels=("bad", "<good>"),
    text_column="text",
    label_column="label",
    concept_columns=("a", "b", "c"),
)


def scores(accuracy):
    names = ("accuracy", "macro_f1", "paper_macro_f1", "ece", "log_loss", "majority_accuracy")
    return {**dict.fromkeys(names, accuracy), "num": 7.0}


METRICS = {
    "test": {
        "num_examples": 7,
        "concept": {**scores(0.8125), "mean_accuracy": 0.8},
        "concepts": {name: scores(0.75) for name in SCHEMA.concepts},
        "task": {**scores(0.625), "ece": None},
    },
    "best_epoch": 3,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(TEXTS * 2, vocab_size=200)


def make_model(tokenizer, strategy="sparse", masked=True, **backbone):
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32, "max_positions": 64}
    family = {"family": "bert", "type_vocab_size": 2, "vocab_size": len(tokenizer), **sizes, **backbone}
    backbone_config = BackboneConfig(**family)
    config = CBMConfig(backbone_config, num_concepts=3, num_classes=3, num_labels=2, gamma=4.0)
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), backbone_config)
    # Larger than at initialisation, so that texts differ.
    params = jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 2 else leaf, params)
    masks = None
    if masked:
        masks = masks_lib.create(params, maskable_paths(backbone_config), 3)
        masks = {
            path: jax.random.bernoulli(jax.random.fold_in(jax.random.key(1), index), 0.4, mask.shape)
            for index, (path, mask) in enumerate(masks.items())
        }
    heads = init_heads(jax.random.key(2), config, has_bottleneck=strategy != "standard")
    heads = jax.tree.map(lambda leaf: leaf * 4, heads)
    metadata = {"seed": 3, "dataset": "sample", "backbone": "tiny", "max_length": 48, "metrics": METRICS}
    return SparseCBM(config, params, masks, heads, SCHEMA, tokenizer, strategy, metadata)


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return save(model, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def copy(saved, tmp_path):
    """A saved model that a test may damage."""
    return shutil.copytree(saved, tmp_path / "copy")


def edit_config(directory, edit):
    content = json.loads((directory / "config.json").read_text())
    edit(content)
    (directory / "config.json").write_text(json.dumps(content))


def test_directory_holds_the_named_files_and_nothing_half_written(saved):
    names = {path.name for path in saved.iterdir()}
    assert {"config.json", "model.safetensors", "masks.safetensors", "metrics.json", "README.md"} <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert not [name for name in names if name.startswith(".")]
    assert json.loads((saved / "metrics.json").read_text()) == METRICS
    tensors = load_file(saved / "model.safetensors")
    assert "params/layers/attention/query/kernel" in tensors and "heads/predictor/bias" in tensors
    bits = load_file(saved / "masks.safetensors")["layers/ffn_in/kernel"]
    assert bits.dtype == np.uint8 and bits.size == 3 * 1 * 16 * 32 // 8


def test_no_file_is_a_pickle(saved):
    for path in saved.iterdir():
        with pytest.raises((ValueError, IndexError)):
            list(pickletools.genops(path.read_bytes()))


def test_load_gives_back_the_same_bits_and_predictions(model, saved):
    loaded = load(saved)
    assert (loaded.config, loaded.schema, loaded.strategy) == (model.config, model.schema, model.strategy)
    chex.assert_trees_all_equal(loaded.params, model.params)
    chex.assert_trees_all_equal(loaded.heads, model.heads)
    chex.assert_trees_all_equal(loaded.masks, model.masks)
    assert loaded.metadata == model.metadata
    chex.assert_trees_all_equal(predict(loaded, TEXTS), predict(model, TEXTS))


def test_public_names_are_these_functions(saved):
    assert sparsecbm_jax.load is load and sparsecbm_jax.predict is predict and sparsecbm_jax.save is save
    assert isinstance(sparsecbm_jax.load(saved), sparsecbm_jax.SparseCBM)


@pytest.mark.parametrize(
    ("strategy", "masked", "backbone"),
    [
        ("joint", False, {}),
        ("standard", False, {}),
        (
            "sparse",
            True,
            {"family": "opt", "type_vocab_size": 0, "position_offset": 2, "embedding_size": 8, "causal": True},
        ),
    ],
)
def test_every_kind_of_model_makes_the_round_trip(tokenizer, tmp_path, strategy, masked, backbone):
    model = make_model(tokenizer, strategy, masked, **backbone)
    loaded = load(save(model, tmp_path))
    assert (loaded.masks is None) == (not masked)
    predictions = predict(loaded, TEXTS)
    chex.assert_trees_all_equal(predictions, predict(model, TEXTS))
    assert predictions.concepts.shape == (len(TEXTS), 0 if strategy == "standard" else 3)
    assert "## How to load" in (tmp_path / "README.md").read_text()


def test_saving_over_another_model_replaces_it(model, tokenizer, saved, tmp_path):
    save(model, tmp_path)
    dense = make_model(tokenizer, "joint", masked=False)
    save(dataclasses.replace(dense, metadata={}), tmp_path)
    assert load(tmp_path).masks is None and not (tmp_path / "masks.safetensors").exists()
    # The scores that stood there were another model's.
    assert "metrics" not in load(tmp_path).metadata and not (tmp_path / "metrics.json").exists()
    assert "62.5" not in (tmp_path / "README.md").read_text()
    save(model, tmp_path, metrics={"test": {"num_examples": 1, "task": scores(0.5)}})
    assert load(tmp_path).metadata["metrics"]["test"]["num_examples"] == 1


def test_an_interrupted_save_leaves_the_old_model_whole(model, copy, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("sparsecbm_jax.model.saved_model.save_file", fail)
    changed = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf + 1, model.params))
    with pytest.raises(OSError, match="disk full"):
        save(changed, copy)
    assert not [path.name for path in copy.iterdir() if path.name.startswith(".")]
    chex.assert_trees_all_equal(predict(load(copy), TEXTS), predict(model, TEXTS))


def test_parts_that_do_not_fit_are_refused_before_anything_is_written(model, tmp_path):
    narrow = {**model.heads, "predictor": {**model.heads["predictor"], "bias": jnp.zeros(5)}}
    with pytest.raises(ArtifactError, match=r"heads/predictor/bias: found \[5\] float32, expected \[2\] float32"):
        save(dataclasses.replace(model, heads=narrow), tmp_path / "a")
    odd = {**model.masks, "layers/attention/querry/kernel": jnp.ones((3, 1, 16, 16), bool)}
    with pytest.raises(ArtifactError, match="did you mean 'layers/attention/query/kernel'"):
        save(dataclasses.replace(model, masks=odd), tmp_path / "a")
    with pytest.raises(ArtifactError, match="num_labels = 2, but its schema 3"):
        save(dataclasses.replace(model, schema=dataclasses.replace(SCHEMA, labels=("1", "2", "3"))), tmp_path / "a")
    with pytest.raises(TypeError, match="JSON serializable"):
        save(dataclasses.replace(model, metadata={"path": tmp_path}), tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "masks.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_missing_and_truncated_files_are_named(copy, name, damage):
    content = (copy / name).read_bytes()
    (copy / name).unlink()
    if damage == "truncated":
        (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")) as error:
        load(copy)
    assert {"missing": "missing", "truncated": "not JSON" if name == "config.json" else "truncated"}[damage] in str(
        error.value
    )


def test_missing_tokenizer_and_directory_are_named(copy, tmp_path):
    with pytest.raises(ArtifactError, match="nowhere does not exist; expected the folder of a saved model"):
        load(tmp_path / "nowhere")
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(DataError, match="no tokeniser at"):
        load(copy)


def test_files_of_something_else_are_not_replaced(copy, tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    with pytest.raises(ArtifactError, match=r"project holds README\.md, but no saved model; expected an empty"):
        save(load(copy), folder)
    assert [path.name for path in folder.iterdir()] == ["README.md"]
    assert (folder / "README.md").read_text() == "mine"


def test_wrong_shapes_are_named_with_both(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["heads/projector/bias"] = np.zeros((3, 4), np.float32)
    tensors["params/embed/word/extra"] = tensors.pop("params/embed/word/embedding")
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ArtifactError) as error:
        load(copy)
    message = str(error.value)
    assert "heads/projector/bias: found [3, 4] float32, expected [3, 3] float32" in message
    assert "params/embed/word/embedding: found nothing, expected [" in message
    assert "params/embed/word/extra: found [" in message and str(copy / "model.safetensors") in message


def resave_masks(directory, edit):
    masks = load(directory).masks
    edit(masks)
    facts = {"shapes": {path: list(mask.shape) for path, mask in masks.items()}}
    save_file(masks_lib.to_bits(masks), directory / "masks.safetensors", {"masks": json.dumps(facts)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda m: m.update({"layers/ffn_inn/kernel": m.pop("layers/ffn_in/kernel")}),
            "did you mean 'layers/ffn_in/kernel'",
        ),
        (
            lambda m: m.update({"layers/ffn_in/kernel": jnp.ones((3, 1, 16, 31), bool)}),
            r"\[3, 1, 16, 31\], expected \[3, 1, 16, 32\]",
        ),
        (
            lambda m: m.update({"layers/ffn_in/kernel": ~m["layers/ffn_in/kernel"]}),
            "does not hold the masks that config.json names",
        ),
    ],
)
def test_masks_of_another_model_are_refused(copy, edit, message):
    resave_masks(copy, edit)
    with pytest.raises(ArtifactError, match=message):
        load(copy)


def test_masks_file_without_shapes_or_beside_a_dense_model_is_refused(copy):
    save_file({"layers/ffn_in/kernel": np.zeros(3, np.uint8)}, copy / "masks.safetensors")
    with pytest.raises(ArtifactError, match="lacks the masks' shapes"):
        load(copy)
    edit_config(copy, lambda content: content.update(sparsity=None))
    with pytest.raises(ArtifactError, match="says that the model is dense"):
        load(copy)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(format_version=2), "format_version is 2, expected 1"),
        (lambda c: c.update(stratergy="sparse"), "unknown key 'stratergy'; did you mean 'strategy'"),
        (lambda c: c["model"].update(gama=1.0), "unknown key 'gama'; did you mean 'gamma'"),
        (lambda c: c["model"]["backbone"].update(hidden=1), "unknown key 'hidden'"),
        (lambda c: c["schema"].update(concept=[]), "'concept'"),
        (lambda c: c.pop("schema"), "lacks schema"),
        (lambda c: c.update(strategy="dense"), "strategy is 'dense', expected one of standard, independent"),
        (lambda c: c["model"].update(num_labels=4), "num_labels = 4, but its schema 2"),
        (lambda c: c.update(model=None), "model is None, expected dict"),
        (lambda c: c.update(sparsity=[]), "sparsity is .., expected dict or null"),
        (lambda c: c["sparsity"].pop("fingerprint"), "sparsity lacks the masks' fingerprint"),
        (lambda c: c.update(max_length="abc"), "max_length is 'abc', expected int"),
        (lambda c: c["metadata"].update(mean_activations=[[0.0] * 3] * 2), "mean_activations is not 3 x 3 finite"),
        (lambda c: c["metadata"].update(class_activations=[[[0.0] * 3] * 3] * 3), "mean_activations is not 3 x 3"),
        (lambda c: c["model"]["backbone"].update(num_layers="2"), "model does not describe one"),
    ],
)
def test_a_config_of_another_format_is_refused(copy, edit, message):
    edit_config(copy, edit)
    with pytest.raises(ArtifactError, match=message) as error:
        load(copy)
    assert str(copy / "config.json") in str(error.value)


def test_loads_straight_onto_a_mesh(model, saved):
    mesh = make_mesh(data=1, fsdp=2, tensor=2)
    loaded = load(saved, mesh=mesh)
    kernel = loaded.params["layers"]["ffn_in"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (1, 8, 16)
    assert loaded.masks["layers/ffn_in/kernel"].addressable_shards[0].data.shape == (3, 1, 8, 16)
    chex.assert_trees_all_equal(jax.device_get(loaded.params), jax.device_get(model.params))
    chex.assert_trees_all_equal(jax.device_get(loaded.masks), jax.device_get(model.masks))
    chex.assert_trees_all_close(predict(loaded, TEXTS, mesh=mesh), predict(model, TEXTS), atol=COMPANY_TOLERANCE)


def test_predictions_keep_the_order_and_do_not_depend_on_company(model):
    together = predict(model, TEXTS)
    assert together.concept_probabilities.shape == (5, 3, 3) and together.label_probabilities.shape == (5, 2)
    # Otherwise the order could not be told.
    assert len({tuple(row) for row in together.label_probabilities.tolist()}) == len(TEXTS)
    for index, text in enumerate(TEXTS):
        alone = predict(model, [text])
        chex.assert_trees_all_close(
            [leaf[0] for leaf in alone], [leaf[index] for leaf in together], atol=COMPANY_TOLERANCE
        )
    backwards = predict(model, TEXTS[::-1], batch_size=2)
    chex.assert_trees_all_close([leaf[::-1] for leaf in backwards], list(together), atol=COMPANY_TOLERANCE)
    chex.assert_trees_all_close(together.concept_probabilities.sum(-1), np.ones((5, 3)), rtol=1e-6)
    chex.assert_trees_all_equal(together.concepts, together.concept_probabilities.argmax(-1).astype(np.int32))


def test_no_texts_give_no_predictions(model):
    empty = predict(model, [])
    assert [leaf.shape for leaf in empty] == [(0, 3, 3), (0, 2), (0, 3), (0,), (0, 3), (0,)]


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        (["fine", "  \n"], ValueError, r"texts\[1\] is '  \\n'"),
        (["fine", ""], ValueError, r"texts\[1\] is ''"),
        (["fine", None], TypeError, r"texts\[1\] is a NoneType, expected a str"),
        (["fine", b"bytes"], TypeError, r"texts\[1\] is a bytes"),
        ("fine", TypeError, r"one str, expected a sequence"),
    ],
)
def test_bad_texts_are_named(model, texts, error, message):
    with pytest.raises(error, match=message):
        predict(model, texts)


def test_card_says_what_the_model_is_with_text_escaped(saved):
    card = (saved / "README.md").read_text()
    for heading in ("What it is", "Concepts and labels", "Metrics", "Sparsity", "How to load", "Limits"):
        assert f"\n## {heading}\n" in card
    assert "| all concepts | 81.2 |" in card and "| task | 62.5 |" in card
    assert r"ambi\|ance \*" in card and "&lt;good&gt;" in card and "<good>" not in card
    assert "cut at 48 tokens" in card
    density = json.loads((saved / "config.json").read_text())["sparsity"]["density"]["food"]
    assert f"| food | {100 * density:.1f} | {100 * (1 - density):.1f} |" in card


def test_front_matter_is_yaml_whatever_the_names(saved):
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the card's front matter back")
    config = json.loads((saved / "config.json").read_text())
    name = 'a: "b"\n- c #d \u2028 \x85 😀'
    config["metadata"]["dataset"] = "x: [y"
    card = card_lib.render(name, config, METRICS)
    head = yaml.safe_load(card.split("---\n")[1])
    (index,) = head["model-index"]
    (result,) = index["results"]
    assert index["name"] == name and result["dataset"]["name"] == "x: [y" and result["dataset"]["split"] == "test"
    assert {"type": "accuracy", "name": "task accuracy", "value": 0.625} in result["metrics"]
    assert head["base_model"] == "tiny"
