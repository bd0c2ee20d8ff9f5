"""The model: K masked passes of one backbone, the concept bottleneck, the label, and the losses.

text → z_k = pool(f_{θ_{M_k}}(x)) → u_k = z_k ψ_k + β_k → a_k = σ(u_k) → y = φ_0 + Σ_k a_k φ_k.

A backbone is three mask-ignorant functions, embed → layer → finish, and this room alone composes them: layers are
scanned outside, concepts run inside each layer, so a layer's weights and the bits of its K masks are gathered once
and every concept uses that copy. Dense models, one concept, K concepts, Fisher gradients, token gradients and
interventions are this same composition with other masks and another argument differentiated.

Reference: Tan et al. 2024, Eq. 1 to 3.
Deviation: cross-entropy of the concepts takes u, not σ(u): a softmax over σ(u) cannot fall below about 0.55 for three
classes. z is the mean over real tokens, not over padding.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from sparsecbm_jax import masks as masks_lib
from sparsecbm_jax import sharding
from sparsecbm_jax.backbones import Backbone, BackboneConfig, make_backbone
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.masks import AnyMasks, Params
from sparsecbm_jax.sharding import SINGLE, Axes

Heads = Mapping[str, Mapping[str, Any]]
Kernels = Mapping[str, Float[Array, "K ..."]]

REMAT_POLICIES: Mapping[str, Callable[..., Any] | None] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "selective": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}

# Folded into a row's key: the layers take their own number, concepts start here.
_CONCEPT_STREAM = 1_000_000


@dataclass(frozen=True)
class CBMConfig:
    """What is static about a concept-bottleneck model.

    Attributes:
      backbone: the encoder or decoder.
      num_concepts: K.
      num_classes: C, classes of every concept.
      num_labels: Y, classes of the task.
      dtype: matmuls' type, 'float32' or 'bfloat16'; parameters, norms, softmax, pooling and heads stay float32.
      remat: what of a layer is computed again in the backward pass instead of being kept: nothing ('none'), all but
        what its kernels give ('selective'), or everything ('full').
      unroll_layers: on one device, write the layers out instead of looping: compiles several times longer, and on CPU
        runs about a quarter faster.
      gamma: γ, the weight of the concept loss in Eq. 1.
    """

    backbone: BackboneConfig
    num_concepts: int
    num_classes: int
    num_labels: int
    dtype: str = "float32"
    remat: str = "none"
    unroll_layers: bool = False
    gamma: float = 5.0

    def __post_init__(self) -> None:
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat is {self.remat!r}; expected one of {', '.join(map(repr, REMAT_POLICIES))}")


class CBMOutput(NamedTuple):
    """What one pass returns; with the 'standard' strategy (no bottleneck) the concept fields have K = 0.

    Attributes:
      concept_logits: u_k.
      activations: a_k = σ(u_k).
      label_logits: y.
      pooled: z_k; one entry for a dense model, whose concepts share a pass.
    """

    concept_logits: Float[Array, "B K C"]
    activations: Float[Array, "B K C"]
    label_logits: Float[Array, "B Y"]
    pooled: Float[Array, "B P D"]


def init_heads(rng: Array, config: CBMConfig, strategy: str = "sparse") -> dict[str, dict[str, Array]]:
    """Random heads: the projector ψ and predictor φ, or the plain classifier of the 'standard' strategy.

    Kernels are normal with standard deviation 1/√fan_in, biases zero.
    """
    width, k, c, y = config.backbone.output_size, config.num_concepts, config.num_classes, config.num_labels
    projector_rng, predictor_rng = jax.random.split(rng)
    if strategy == "standard":
        return {
            "classifier": {
                "kernel": jax.random.normal(projector_rng, (width, y)) / jnp.sqrt(width),
                "bias": jnp.zeros((y,)),
            }
        }
    return {
        "projector": {
            "kernel": jax.random.normal(projector_rng, (k, width, c)) / jnp.sqrt(width),
            "bias": jnp.zeros((k, c)),
        },
        "predictor": {"kernel": jax.random.normal(predictor_rng, (k, c, y)) / jnp.sqrt(k * c), "bias": jnp.zeros((y,))},
    }


def effective_kernels(params: Params, masks: AnyMasks, num_concepts: int | None = None) -> dict[str, Array]:
    """θ_k on the maskable kernels for every concept, {path: [K, ...]}.

    Differentiating with respect to these, not to θ, keeps gradients at pruned positions alive; and since concept k
    enters the loss only through its own copy, the gradient of the joint loss is that of L_k through subnetwork k.
    """
    if any(map(masks_lib.is_packed, masks.values())):
        if num_concepts is None:
            raise ValueError("packed masks do not know how many concepts they hold; pass num_concepts")
        masks = masks_lib.unpack(dict(masks), num_concepts)
    return {path: jnp.where(mask, masks_lib.leaf_at(params, path), 0) for path, mask in masks.items()}


def pool(hidden: Float[Array, "B T D"], attention_mask: Int[Array, "B T"]) -> Float[Array, "B D"]:
    """Mean over real tokens, in float32; a row without any is zero."""
    weight = attention_mask.astype(jnp.float32)
    total = jnp.einsum("btd,bt->bd", hidden.astype(jnp.float32), weight)
    return total / jnp.maximum(weight.sum(axis=1, keepdims=True), 1.0)


def _row_keys(rng: Array, num_rows: int, axes: Axes) -> Array:
    """One key per row of the global batch: the same noise however rows are spread over devices."""
    rows = jnp.arange(num_rows)
    if axes.is_manual:
        rows = rows + jax.lax.axis_index(sharding.ROW_AXES) * num_rows
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, rows)


def _fold(keys: Array | None, number: int | Int[Array, ""]) -> Array | None:
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def _group(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {path: leaf for path, leaf in tree.items() if path.startswith(prefix)}


def encode(
    config: CBMConfig,
    params: Params,
    batch: Batch,
    *,
    masks: AnyMasks | None = None,
    kernels: Kernels | None = None,
    word_embeddings: Float[Array, "... B T E"] | None = None,
    dropout_rng: Array | None = None,
    axes: Axes = SINGLE,
    backbone: Backbone | None = None,
) -> Float[Array, "B P D"]:
    """Pooled representations z, one per subnetwork.

    Args:
      config: the model.
      params: the backbone; this device's shards where `axes` is manual.
      batch: token ids and attention mask; this device's rows where `axes` is manual.
      masks: K boolean masks, or packed bits (config.num_concepts of them); None runs one dense pass (P = 1).
      kernels: {path: [P, ...]} effective kernels used instead of the masked parameters; see `effective_kernels`.
      word_embeddings: replaces the token lookup, shared [B, T, E] or per subnetwork [P, B, T, E].
      dropout_rng: key of the step's dropout; None is inference. Embedding dropout is shared by the subnetworks.
      axes: the mesh axes that this body may name.
      backbone: another backbone than the config's, given as the same three functions.

    Returns:
      z, float32; P is K (the local share of K on a `concept` axis), or 1 for a dense pass.
    """
    if backbone is None:
        tensor = {"tensor_axis": "tensor", "tensor_size": axes.size("tensor")} if axes.is_manual else {}
        backbone = make_backbone(config.backbone, dtype=jnp.dtype(config.dtype), **tensor)
    bits: dict[str, Array] = {}
    if kernels is not None:
        passes = next(iter(kernels.values())).shape[0]
    elif masks is not None:
        is_packed = all(map(masks_lib.is_packed, masks.values()))
        passes = config.num_concepts if is_packed else masks_lib.num_concepts(dict(masks))
        bits = dict(masks) if is_packed else masks_lib.pack(masks)
        if axes.size("concept") > 1:
            if passes % axes.size("concept"):
                raise ValueError(f"{passes} concepts do not divide over a concept axis of {axes.size('concept')}")
            passes //= axes.size("concept")
    else:
        passes = 1
    first = jax.lax.axis_index("concept") * passes if axes.is_manual and masks is not None else 0
    over = (*sharding.ROW_AXES, "concept") if masks is not None else sharding.ROW_AXES
    keys = None if dropout_rng is None else _row_keys(dropout_rng, batch.input_ids.shape[0], axes)
    pass_keys = [_fold(keys, _CONCEPT_STREAM + first + k) for k in range(passes)]

    def gathered(tree: Params, prefix: str, leading: bool = False, master: bool = False) -> Any:
        def one(path: Any, leaf: Array) -> Array:
            spec = sharding.spec_for(f"{prefix}/{sharding.path_string(path)}", leaf.ndim + leading)
            # bfloat16 travels; float32 is what gradients are summed in over the concepts. Rounded first, a layer is
            # cast when its turn comes; a cast alone the compiler moves out of the loop, and copies all layers there.
            cast = leaf
            if leaf.ndim > 1:
                kind = jnp.finfo(config.dtype)
                cast = jax.lax.reduce_precision(leaf, kind.nexp, kind.nmant).astype(config.dtype)
            whole = sharding.gather(cast, spec, axes, over, skip_leading=leading)
            return whole.astype(jnp.float32) if master else whole

        return jax.tree_util.tree_map_with_path(one, tree) if axes.is_manual else tree

    def masked(tree: Params, prefix: str, k: int | Int[Array, ""], bits_here: Any, kernels_here: Any) -> Params:
        for path, leaf in kernels_here.items():
            tree = masks_lib.with_leaf(tree, path.removeprefix(f"{prefix}/"), leaf[k])
        for path, leaf in bits_here.items():
            name = path.removeprefix(f"{prefix}/")
            tree = masks_lib.with_leaf(
                tree, name, jnp.where(masks_lib.kept(leaf, first + k), masks_lib.leaf_at(tree, name), 0)
            )
        return tree

    def gathered_bits(tree: Mapping[str, Array], leading: bool) -> dict[str, Array]:
        return {
            path: sharding.gather(leaf, sharding.spec_for(path, leaf.ndim + leading), axes, over, skip_leading=leading)
            for path, leaf in tree.items()
        }

    # Embed: once for all subnetworks unless something in it differs between them.
    embed_tree = dict(params["embed"])
    if axes.size("fsdp") > 1:
        # Looked up where its columns lie: gathered, the table and its gradient would be the largest arrays of all.
        table = embed_tree.pop("word")["embedding"]
        if word_embeddings is None:
            found = sharding.look_up(table, batch.input_ids, axes, over, config.dtype)
            word_embeddings = found.astype(jnp.float32)
    embed_params = gathered(embed_tree, "embed", master=True)
    embed_bits = gathered_bits(_group(bits, "embed/"), leading=False)
    embed_kernels = _group(kernels or {}, "embed/")
    per_pass_words = word_embeddings is not None and word_embeddings.ndim == 4

    def embed(k: int) -> Array:
        words = word_embeddings[k] if word_embeddings is not None and per_pass_words else word_embeddings
        tree = masked(embed_params, "embed", k, embed_bits, embed_kernels)
        return backbone.embed(tree, batch.input_ids, batch.attention_mask, keys=keys, word_embeddings=words)

    is_shared = not (embed_bits or embed_kernels or per_pass_words)
    hidden = [embed(0)] * passes if is_shared else [embed(k) for k in range(passes)]

    def rematerialised(body: Callable[..., Any]) -> Callable[..., Any]:
        if config.remat == "none":
            return body
        # What a loop goes through again cannot be merged with what it did before.
        return jax.checkpoint(body, prevent_cse=config.unroll_layers, policy=REMAT_POLICIES[config.remat])

    # Layers outside, subnetworks inside.
    layer_bits = _group(bits, "layers/")
    layer_kernels = {path: jnp.moveaxis(leaf, 1, 0) for path, leaf in _group(kernels or {}, "layers/").items()}
    unroll = axes.num_devices == 1

    def layer(carry: Any, scanned: Any) -> tuple[Any, None]:
        layer_params, bits_here, kernels_here, number = scanned
        weights = gathered(layer_params, "layers", leading=True, master=True)
        bits_here = gathered_bits(bits_here, leading=True)

        def one(h: Array, k: int | Int[Array, ""], row_keys: Array | None) -> Array:
            tree = masked(weights, "layers", k, bits_here, kernels_here)
            return backbone.layer(tree, h, batch.attention_mask, keys=_fold(row_keys, number))

        if unroll:
            return tuple(one(h, k, pass_keys[k]) for k, h in enumerate(carry)), None

        def inner(_: None, k_and_h: Any) -> tuple[None, Array]:
            k, h, row_keys = k_and_h
            return None, one(h, k, row_keys)

        return jax.lax.scan(rematerialised(inner), None, (jnp.arange(passes), *carry))[1], None

    num_layers = jax.tree.leaves(params["layers"])[0].shape[0]
    scanned = (params["layers"], layer_bits, layer_kernels, jnp.arange(num_layers))
    if unroll:
        carry, _ = jax.lax.scan(
            rematerialised(layer), tuple(hidden), scanned, unroll=num_layers if config.unroll_layers else 1
        )
        hidden = list(carry)
    else:
        stacked_keys = None if keys is None else jnp.stack([key for key in pass_keys if key is not None])

        def with_keys(h: Array, scanned_here: Any) -> tuple[Array, None]:
            return layer((h, stacked_keys), scanned_here)

        # One subnetwork at a time is computed again, with the weights that were gathered again for all.
        stack, _ = jax.lax.scan(rematerialised(with_keys), jnp.stack(hidden), scanned)
        hidden = [stack[k] for k in range(passes)]

    finish_params = gathered(params["finish"], "finish", master=True)
    finish_bits = gathered_bits(_group(bits, "finish/"), leading=False)
    finish_kernels = _group(kernels or {}, "finish/")
    pooled = []
    for k, h in enumerate(hidden):
        tree = masked(finish_params, "finish", k, finish_bits, finish_kernels)
        pooled.append(pool(backbone.finish(tree, h), batch.attention_mask))
    return jnp.stack(pooled, axis=1)


def project(heads: Heads, z: Float[Array, "B P D"]) -> Float[Array, "B K C"]:
    """u_k = z_k ψ_k + β_k; a dense model's single z serves every concept."""
    kernel, bias = heads["projector"]["kernel"], heads["projector"]["bias"]
    if z.shape[1] == 1:
        return jnp.einsum("bd,kdc->bkc", z[:, 0], kernel) + bias
    return jnp.einsum("bkd,kdc->bkc", z, kernel) + bias


def predict_label(heads: Heads, activations: Float[Array, "B K C"], axes: Axes = SINGLE) -> Float[Array, "B Y"]:
    """y = φ_0 + Σ_k a_k φ_k (Eq. 3), summed over the `concept` axis where there is one."""
    total = jnp.einsum("bkc,kcy->by", activations, heads["predictor"]["kernel"])
    if axes.is_manual:
        total = jax.lax.psum(total, "concept")
    return total + heads["predictor"]["bias"]


def forward(
    config: CBMConfig, params: Params, masks: AnyMasks | None, heads: Heads, batch: Batch, **encode_args: Any
) -> CBMOutput:
    """The whole model, text to label; see `encode` for the keyword arguments.

    Args:
      masks: None runs the dense model, one pass for all concepts.
    """
    axes = encode_args.get("axes", SINGLE)
    z = encode(config, params, batch, masks=masks, **encode_args)
    if "classifier" in heads:
        logits = z[:, 0] @ heads["classifier"]["kernel"] + heads["classifier"]["bias"]
        empty = jnp.zeros((z.shape[0], 0, config.num_classes), z.dtype)
        return CBMOutput(empty, empty, logits, z)
    u = project(heads, z)
    activations = jax.nn.sigmoid(u)
    return CBMOutput(u, activations, predict_label(heads, activations, axes), z)


LossFn = Callable[[CBMConfig, CBMOutput, Batch, Axes], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]


def weighted_mean(
    values: Float[Array, "..."], weights: Float[Array, "..."], axes: Axes, over: tuple[str, ...]
) -> Float[Array, ""]:
    """Σ w v / Σ w over this device's values and the mesh axes `over`; 0 where nothing weighs anything."""
    total, weight = jnp.sum(values * weights), jnp.sum(weights)
    if axes.is_manual:
        total, weight = jax.lax.psum((total, weight), over)
    return total / jnp.maximum(weight, 1.0)


def task_loss(
    config: CBMConfig, output: CBMOutput, batch: Batch, axes: Axes = SINGLE
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """CE(y, label) over rows that have a task label ('standard' strategy)."""
    weights = batch.example_weight * (batch.label >= 0)
    entropy = optax.softmax_cross_entropy_with_integer_labels(output.label_logits, jnp.maximum(batch.label, 0))
    loss = weighted_mean(entropy, weights, axes, sharding.ROW_AXES)
    return loss, {"task_loss": loss}


def concept_loss(
    config: CBMConfig, output: CBMOutput, batch: Batch, axes: Axes = SINGLE
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """mean_k CE(u_k, c_k) over cells that have a label (first stage of 'independent' and 'sequential')."""
    weights = batch.example_weight[:, None] * (batch.concepts >= 0)
    entropy = optax.softmax_cross_entropy_with_integer_labels(output.concept_logits, jnp.maximum(batch.concepts, 0))
    loss = weighted_mean(entropy, weights, axes, (*sharding.ROW_AXES, "concept"))
    return loss, {"concept_loss": loss}


def joint_loss(
    config: CBMConfig, output: CBMOutput, batch: Batch, axes: Axes = SINGLE
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """L_joint = CE(y, label) + γ · mean_k CE(u_k, c_k) (Eq. 1); Eq. 2 sums over k, which is K times this."""
    task, task_parts = task_loss(config, output, batch, axes)
    concept, concept_parts = concept_loss(config, output, batch, axes)
    return task + config.gamma * concept, {**task_parts, **concept_parts}


def subnetwork_output(
    config: CBMConfig,
    params: Params,
    heads: Heads,
    batch: Batch,
    kernels: Mapping[str, Float[Array, "..."]],
    concept: int | Int[Array, ""],
    activations: Float[Array, "B K C"],
) -> CBMOutput:
    """One pass of subnetwork k, the other concepts' activations held as they are.

    Args:
      kernels: {path: array} effective kernels of subnetwork k, without a concept axis; differentiate wrt these.
      concept: k; may be traced.
      activations: a of all concepts at the current masks; entry k is computed anew.

    Returns:
      u and z of concept k alone (K = 1), the activations of all concepts, and the label that follows from them.
    """
    z = encode(config, params, batch, kernels={path: kernel[None] for path, kernel in kernels.items()})
    projector = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, concept, 0), heads["projector"])
    u = project({"projector": projector}, z)
    others = jax.lax.stop_gradient(activations)
    mixed = jax.lax.dynamic_update_index_in_dim(others, jax.nn.sigmoid(u[:, 0]), concept, 1)
    return CBMOutput(u, mixed, predict_label(heads, mixed), z)


def subnetwork_loss(
    config: CBMConfig,
    params: Params,
    heads: Heads,
    batch: Batch,
    kernels: Mapping[str, Float[Array, "..."]],
    concept: int | Int[Array, ""],
    activations: Float[Array, "B K C"],
) -> Float[Array, ""]:
    """L_k = CE(y, label) + γ · CE(u_k, c_k) through subnetwork k alone; arguments as in `subnetwork_output`."""
    output = subnetwork_output(config, params, heads, batch, kernels, concept, activations)
    cells = jax.lax.dynamic_slice_in_dim(jnp.asarray(batch.concepts), concept, 1, axis=1)
    loss, _ = joint_loss(config, output, batch._replace(concepts=cells))
    return loss


def _batch_specs(has_concepts: bool) -> Batch:
    rows = sharding.BATCH_SPEC
    cells = P(sharding.ROW_AXES, "concept") if has_concepts else rows
    return Batch(input_ids=rows, attention_mask=rows, concepts=cells, label=rows, example_weight=rows, row_ids=rows)  # type: ignore[arg-type]


def make_loss(
    config: CBMConfig, mesh: Mesh | None = None, loss_fn: LossFn = joint_loss, backbone: Backbone | None = None
) -> Callable[..., tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]:
    """A function (params, heads, packed or None, batch, dropout_rng or None) → (loss, parts) on a mesh.

    On several devices its body is a fully manual `shard_map`: left to itself the partitioner masks before it gathers,
    so that weights travel K times, and reduces gradients K times.
    """
    axes = sharding.axes_of(mesh)

    def local(params: Params, heads: Heads, packed: Any, batch: Batch, dropout_rng: Any) -> Any:
        output = forward(config, params, packed, heads, batch, dropout_rng=dropout_rng, axes=axes, backbone=backbone)
        return loss_fn(config, output, batch, axes)

    if not axes.is_manual:
        return local

    def sharded(params: Params, heads: Heads, packed: Any, batch: Batch, dropout_rng: Any) -> Any:
        specs = (
            sharding.param_specs(params),
            sharding.param_specs(heads),
            None if packed is None else sharding.packed_specs(packed),
            _batch_specs("classifier" not in heads),
            None if dropout_rng is None else P(),
        )
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(params, heads, packed, batch, dropout_rng)

    return sharded


@functools.lru_cache(maxsize=32)
def make_forward(config: CBMConfig, mesh: Mesh | None = None) -> Callable[..., CBMOutput]:
    """A jitted function (params, masks or packed or None, heads, batch) → CBMOutput in inference mode, on a mesh."""
    axes = sharding.axes_of(mesh)

    def local(params: Params, packed: Any, heads: Heads, batch: Batch) -> CBMOutput:
        return forward(config, params, packed, heads, batch, axes=axes)

    if not axes.is_manual:
        return jax.jit(local)

    def sharded(params: Params, masks: Any, heads: Heads, batch: Batch) -> CBMOutput:
        packed = masks
        if masks is not None and any(mask.dtype == jnp.bool_ for mask in masks.values()):
            packed = masks_lib.pack(masks)
        rows, by_concept = sharding.BATCH_SPEC, P(sharding.ROW_AXES, "concept")
        is_standard = "classifier" in heads
        concepts = rows if is_standard else by_concept
        specs = (
            sharding.param_specs(params),
            None if packed is None else sharding.packed_specs(packed),
            sharding.param_specs(heads),
            _batch_specs(not is_standard),
        )
        out = CBMOutput(concepts, concepts, rows, rows if packed is None else by_concept)  # type: ignore[arg-type]
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out)(params, packed, heads, batch)

    return jax.jit(sharded)
