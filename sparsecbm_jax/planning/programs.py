"""A run's programs as shapes on a mesh: arguments, other arrays in memory, and the flops that they have to compute.

The programs are the functions that training, pruning and intervening run; no array is allocated.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsecbm_jax import backbones
from sparsecbm_jax.backbones.pretrained import read_config
from sparsecbm_jax.config.run_config import MeshConfig, OptimConfig, RunConfig
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core import sharding
from sparsecbm_jax.core.trees import leaf_at, path_string
from sparsecbm_jax.data.batches import Batch, TeacherLogits
from sparsecbm_jax.data.presets import configured_schema
from sparsecbm_jax.intervention import fixed_size_edit
from sparsecbm_jax.intervention.mask_edit import ConceptCorrection
from sparsecbm_jax.intervention.ranking import signed
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.forward import make_forward
from sparsecbm_jax.model.heads import init_heads
from sparsecbm_jax.model.sparse_cbm import ModelArrays
from sparsecbm_jax.model.strategies import STRATEGIES
from sparsecbm_jax.pruning import fisher, patterns
from sparsecbm_jax.pruning.gradients import _input_products, subnetwork_gradient
from sparsecbm_jax.pruning.masks_from_scores import prune_lowest
from sparsecbm_jax.pruning.swaps import _swap_piece
from sparsecbm_jax.pruning.woodfisher import form
from sparsecbm_jax.pruning.woodfisher_scores import score_grams, score_rows
from sparsecbm_jax.training import train_step
from sparsecbm_jax.training.teacher import is_distilled, loss_of
from sparsecbm_jax.training.throughput import forward_flops, step_flops

PROGRAMS = ("train_step", "eval_step", "prune_pass", "select", "intervene")
# Leaves with more elements than this must not lie whole on every device.
LARGE = 2**20
# Steps of the run that the learning rates are planned for: no number in a program depends on it.
_NUM_STEPS = 1000


class Part(NamedTuple):
    """One compiled program, of which a step of the run may take several.

    Attributes:
        name: Name of the part.
        lower: Traces the program.
        times: Number of runs in a step.
        beside: Bytes that a device holds meanwhile and that are not among the program's arguments.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    times: float = 1.0
    beside: float = 0.0


def model_config(run: RunConfig) -> CBMConfig:
    """Returns the configuration of the model that a run trains, without reading data or weights.

    Raises:
        ValueError: The backbone's shape is neither known nor in a local directory, or the data's classes and labels
            are to be inferred from data.
    """
    name = run.backbone.name
    if Path(name).expanduser().is_dir():
        backbone = read_config(Path(name).expanduser())
    else:
        backbone = backbones.published_config(name)
    schema = configured_schema(run.data)
    if not (schema.classes and schema.labels):
        raise ValueError(
            "a plan reads no data: with config.data.preset='columns', name config.data.classes and config.data.labels"
        )
    return CBMConfig.of_run(run, backbone, schema)


def abstract_mesh(mesh: MeshConfig) -> AbstractMesh:
    """Makes a mesh without devices, which suffices for shardings."""
    return AbstractMesh(tuple(getattr(mesh, name) for name in sharding.AXES), sharding.AXES)


@functools.lru_cache(maxsize=4)
def _unplaced(config: CBMConfig, strategy: str, optim: OptimConfig) -> tuple[Any, Any, Any, Any]:
    """Returns a key, parameters, heads and the optimiser's state, as shapes without placement."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(functools.partial(backbones.init_params, config=config.backbone), key)
    has_bottleneck = STRATEGIES[strategy].has_bottleneck
    heads = jax.eval_shape(functools.partial(init_heads, config=config, has_bottleneck=has_bottleneck), key)
    tx = train_step.make_optimizer(optim, _NUM_STEPS)
    return key, params, heads, jax.eval_shape(tx.init, {"backbone": params, "heads": heads})


class Shapes:
    """The arguments of a run's programs, as shapes placed on a mesh."""

    def __init__(self, run: RunConfig, mesh: Mesh | AbstractMesh) -> None:
        self.run, self.mesh, self.config = run, mesh, model_config(run)
        self.is_sparse = STRATEGIES[run.strategy].is_sparse
        backbone = self.config.backbone
        self.length = min(run.data.max_length, backbone.max_length)
        self.tx = train_step.make_optimizer(run.optim, _NUM_STEPS)
        self.rng, params, heads, opt_state = _unplaced(self.config, run.strategy, run.optim)
        for tree in (params, heads):
            sharding.check_divisible(tree, mesh)  # type: ignore[arg-type]
        self.params, self.heads, self.opt_state = (self._by_rules(tree) for tree in (params, heads, opt_state))
        self.kernels = {path: leaf_at(self.params, path) for path in backbones.maskable_paths(backbone)}
        self.packed = self.cast(masks_lib.packed_dtype(self.config.num_concepts)) if self.is_sparse else None
        self.mask = self.cast(jnp.bool_)
        self.masks = {
            path: self._placed((self.config.num_concepts, *leaf.shape), leaf.dtype, P(None, *leaf.sharding.spec))
            for path, leaf in self.mask.items()
        }

    def _placed(self, shape: Sequence[int], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(self.mesh, spec))

    def _by_rules(self, tree: Any) -> Any:
        specs = sharding.param_specs(tree)
        return jax.tree.map(lambda leaf, spec: self._placed(leaf.shape, leaf.dtype, spec), tree, specs)

    def cast(self, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the maskable kernels with elements of another type."""
        return {path: leaf.update(dtype=dtype) for path, leaf in self.kernels.items()}

    @property
    def state(self) -> train_step.TrainState:
        """The state of training."""
        step: Any = self._placed((), jnp.int32, P())
        packed: Any = self.packed
        return train_step.TrainState(step, self.params, self.heads, self.opt_state, packed)

    def batch(self, rows: int, spec: P, *, has_teacher: bool = False) -> Batch:
        """Returns a batch of the longest texts."""
        length, config = self.length, self.config

        def placed(*shape: int, dtype: Any = jnp.int32) -> Any:
            return self._placed((rows, *shape), dtype, spec)

        teacher = TeacherLogits(
            placed(config.num_concepts, config.num_classes, dtype=jnp.float32),
            placed(config.num_labels, dtype=jnp.float32),
        )
        return Batch(
            input_ids=placed(length),
            attention_mask=placed(length),
            concepts=placed(config.num_concepts),
            label=placed(),
            example_weight=placed(dtype=jnp.float32),
            row_ids=placed(),
            teacher=teacher if has_teacher else None,
        )

    def scalar(self, dtype: Any) -> jax.ShapeDtypeStruct:
        """Returns a scalar, replicated."""
        return self._placed((), dtype, P())

    def replicated(self, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        """Returns an array that every device has whole."""
        return self._placed(shape, dtype, P())

    def without_inputs(self, path: str) -> jax.ShapeDtypeStruct:
        """Returns the sum of a kernel over its inputs, placed as the kernel is."""
        *layers, _, units = self.kernels[path].shape
        *of_layers, _, of_units = sharding.spec_for(path, len(layers) + 2)
        return self._placed((*layers, units), jnp.float32, P(*of_layers, of_units))

    def arrays(self, masks: Any) -> ModelArrays:
        """Returns the model with these masks, booleans or packed."""
        return ModelArrays(self.params, masks, self.heads)

    def units(self, *shape: int) -> jax.ShapeDtypeStruct:
        """Returns an array whose second axis is spread over all devices, as by `sharding.spread_units`."""
        inputs, units, *rest = shape
        if self.mesh.size == 1:
            return self.replicated(shape)
        return self._placed((inputs, units + -units % self.mesh.size, *rest), jnp.float32, sharding.UNITS_SPEC)


def bytes_of(tree: Any) -> float:
    """Computes the bytes of a tree of placed shapes on each device."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.sharding is not None]
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


def describe_shardings(shapes: Shapes) -> dict[str, str]:
    """Describes the shardings of parameters and heads; masks are sharded as their kernels.

    Returns:
        {path: 'shape (axes of each dimension) = shape on a device'}.
    """

    def described(leaf: jax.ShapeDtypeStruct) -> str:
        spec = tuple(leaf.sharding.spec) + (None,) * (len(leaf.shape) - len(leaf.sharding.spec))
        names = ["-" if name is None else "+".join((name,) if isinstance(name, str) else name) for name in spec]
        shard = leaf.sharding.shard_shape(leaf.shape)
        return f"{'x'.join(map(str, leaf.shape))} ({', '.join(names)}) = {'x'.join(map(str, shard))}"

    trees = {"params": shapes.params, "heads": shapes.heads}
    return {
        path_string(path): described(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(trees) if leaf.shape
    }


def left_whole(shapes: Shapes) -> list[str]:
    """Lists large leaves of which every device that shares parameters has a whole copy; none if nothing is shared."""
    if shapes.mesh.shape["fsdp"] * shapes.mesh.shape["tensor"] == 1:
        return []
    leaves = jax.tree_util.tree_leaves_with_path(shapes.state)
    return [
        path_string(path)
        for path, leaf in leaves
        if leaf.sharding.shard_shape(leaf.shape) == leaf.shape and math.prod(leaf.shape) > LARGE
    ]


def parts_of(program: str, shapes: Shapes) -> list[Part]:
    """Lists the parts to compile for one of `PROGRAMS`; none for those that a dense run does not have."""
    if program == "train_step":
        return [_train_step(shapes)]
    if program == "eval_step":
        return [_eval_step(shapes)]
    if not shapes.is_sparse:
        return []
    return {"prune_pass": _prune_pass, "select": _select, "intervene": _intervene}[program](shapes)


def _train_step(shapes: Shapes) -> Part:
    run = shapes.run
    step = train_step.make_train_step(shapes.config, shapes.tx, shapes.mesh, loss_fn=loss_of(run))
    batch = shapes.batch(run.training.batch_size, sharding.BATCH_SPEC, has_teacher=is_distilled(run))
    return Part("train_step", lambda: step.lower(shapes.state, batch, shapes.rng))  # type: ignore[attr-defined]


def _eval_step(shapes: Shapes) -> Part:
    forward = make_forward(shapes.config, shapes.mesh)
    batch = shapes.batch(shapes.run.training.eval_batch_size, sharding.BATCH_SPEC)
    lower = functools.partial(forward.lower, shapes.arrays(shapes.packed), batch)  # type: ignore[attr-defined]
    return Part("eval_step", lower, beside=bytes_of(shapes.opt_state))


def held_in_training(shapes: Shapes) -> float:
    """Computes the bytes that training holds while it prunes: its state, old and new masks, θ_k and its mask."""
    return bytes_of(shapes.state) + 2 * bytes_of(shapes.masks) + bytes_of(shapes.kernels) + bytes_of(shapes.mask)


def _select(shapes: Shapes) -> list[Part]:
    unit = patterns.unit_of(shapes.run.pruner.pattern, shapes.run.pruner.block_size)
    count = shapes.replicated((2,), jnp.uint32)
    arguments = shapes.mask, shapes.kernels, count, shapes.mask, unit
    # Scores are sharded as their kernels.
    held = held_in_training(shapes) - bytes_of(shapes.mask)
    return [Part("select", functools.partial(prune_lowest.lower, *arguments), beside=held)]


def _intervene(shapes: Shapes) -> list[Part]:
    config, index = shapes.config, shapes.scalar(jnp.int32)
    row = shapes.replicated((1,), jnp.int32)
    lower = functools.partial(
        fixed_size_edit._intervene.lower,
        config,
        shapes.arrays(shapes.masks),
        ConceptCorrection(shapes.batch(1, P()), index, row, row),  # type: ignore[arg-type]
        shapes.scalar(jnp.uint32),
        index,
        None,
        saliency_fn=signed,
    )
    return [Part("intervene", lower)]


def _prune_pass(shapes: Shapes) -> list[Part]:
    """Plans one pass over the gradients of one concept: the pieces of the fullest pass of `fisher.plan_passes`."""
    run, config, mesh = shapes.run, shapes.config, shapes.mesh
    pruner = run.pruner
    if pruner.criterion == "combinatorial":
        return _swap_pass(shapes)
    if pruner.criterion != "woodfisher":
        return []
    on_mesh = mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None
    is_dual = form(pruner.num_grads, pruner.block_size) == "dual"
    passes = fisher.plan_passes(shapes.kernels, pruner)
    pieces = max(passes, key=lambda pieces: fisher._pass_bytes(pieces, shapes.kernels, pruner))
    rows = 1 if pruner.per_example else pruner.grad_batch_size
    batch, index, number = shapes.batch(rows, P()), shapes.scalar(jnp.int32), shapes.scalar(jnp.float32)
    activations = shapes.replicated((rows, config.num_concepts, config.num_classes))

    def cut_of(piece: fisher.Piece) -> jax.ShapeDtypeStruct:
        return shapes.units(shapes.kernels[piece.path].shape[-2], piece.stop - piece.start)

    def gram_of(cut: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        size = pruner.block_size
        return shapes.units(-(-cut.shape[0] // size), cut.shape[1], size, size)

    cuts = [cut_of(piece) for piece in pieces]
    largest = max(cuts, key=bytes_of)
    share = sum(bytes_of(cut) for cut in cuts) / bytes_of(largest)
    num_buffered = pruner.num_grads if is_dual else min(fisher.BUFFER, pruner.num_grads)
    buffered = num_buffered * bytes_of(cuts)
    sums = 0.0 if is_dual else sum(bytes_of(gram_of(cut)) for cut in cuts)
    held, own = held_in_training(shapes), bytes_of((shapes.params, shapes.heads))
    squares = {path: shapes.without_inputs(path) for path in shapes.kernels}
    gradient = functools.partial(
        subnetwork_gradient.lower,
        config,
        shapes.params,
        shapes.mask,
        shapes.heads,
        batch,
        index,
        activations,
    )
    forward = functools.partial(
        make_forward(config).lower,  # type: ignore[attr-defined]
        shapes.arrays(shapes.packed),
        batch,
    )
    parts = [
        Part(
            "activations",
            forward,
            pruner.num_grads / len(passes) / config.num_concepts,
            held - own - bytes_of(shapes.packed),
        ),
        Part("gradient", gradient, pruner.num_grads, held - own - bytes_of(shapes.mask) + sums + buffered),
        Part(
            "cut",
            lambda: fisher._cut.lower(shapes.kernels, squares, pieces, on_mesh),
            pruner.num_grads,
            held + sums + buffered - bytes_of(cuts),
        ),
    ]
    if is_dual:
        rows_of_piece = [largest] * pruner.num_grads
        score = functools.partial(
            score_rows.lower, largest, rows_of_piece, number, pruner.block_size, pruner.pattern, on_mesh
        )
        return [*parts, Part("score", score, share, held + buffered - num_buffered * bytes_of(largest))]
    total = gram_of(largest)
    add = functools.partial(fisher._add.lower, total, [largest] * num_buffered, on_mesh)
    score = functools.partial(
        score_grams.lower, largest, total, number, number, pruner.block_size, pruner.pattern, on_mesh
    )
    others = held + sums - bytes_of(total)
    num_flushes = -(-pruner.num_grads // num_buffered)
    return [
        *parts,
        Part("add", add, share * num_flushes, others + buffered - num_buffered * bytes_of(largest)),
        Part("score", score, share, others),
    ]


def _swap_pass(shapes: Shapes) -> list[Part]:
    """Plans the scores and exchanges of one concept by criterion 'combinatorial'."""
    config, mesh, pruner = shapes.config, shapes.mesh, shapes.run.pruner
    on_mesh = mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None
    rows, size = 1 if pruner.per_example else pruner.grad_batch_size, pruner.block_size
    batch, index = shapes.batch(rows, P()), shapes.scalar(jnp.int32)
    activations = shapes.replicated((rows, config.num_concepts, config.num_classes))
    arrays = config, shapes.params, shapes.mask
    inputs, units = max((leaf.shape[-2:] for leaf in shapes.kernels.values()), key=math.prod)
    spread = shapes.units(inputs, units)
    kept = jax.ShapeDtypeStruct(spread.shape, bool, sharding=spread.sharding)
    products = shapes.replicated((-(-inputs // size), size, size))
    num_pieces = sum(math.prod(leaf.shape) for leaf in shapes.kernels.values()) / (inputs * units)
    # Beside the run's arrays, the scores, or before they are made the sums of g².
    held = held_in_training(shapes) - bytes_of((shapes.params, shapes.heads, shapes.mask)) + bytes_of(shapes.kernels)
    return [
        Part(
            "gradient",
            lambda: subnetwork_gradient.lower(*arrays, shapes.heads, batch, index, activations),
            pruner.num_grads,
            held,
        ),
        Part("inputs", lambda: _input_products.lower(*arrays, batch, size), pruner.num_grads, held),
        Part("swap", lambda: _swap_piece.lower(spread, spread, kept, kept, products, on_mesh), num_pieces, held),
    ]


def model_flops(program: str, shapes: Shapes) -> float:
    """Counts the flops of a program's products over all devices, without recomputation or duplicates."""
    run, config, k = shapes.run, shapes.config, shapes.config.num_concepts
    pruner, passes = run.pruner, k if shapes.is_sparse else 1
    forward = functools.partial(forward_flops, config.backbone, shapes.length)
    if program == "train_step":
        return step_flops(config, shapes.length, run.training.batch_size, is_sparse=shapes.is_sparse)
    if program == "eval_step":
        return passes * forward(run.training.eval_batch_size)
    if program == "intervene":
        # All concepts before, the corrected one forward and back, and after.
        return (k + 4) * forward(1)
    if program == "select":
        return 0.0
    per_gradient = forward(1 if pruner.per_example else pruner.grad_batch_size)
    if pruner.criterion == "combinatorial":
        # Gradients, and the inputs of the kernels.
        return pruner.num_grads * 4 * per_gradient
    num_passes = len(fisher.plan_passes(shapes.kernels, pruner))
    num_weights = sum(math.prod(leaf.shape) for leaf in shapes.kernels.values()) / num_passes
    # Gradients, their activations (computed once for all passes and concepts), and the products of a Fisher block.
    outer = 2 * pruner.num_grads * min(pruner.block_size, pruner.num_grads) * num_weights
    return pruner.num_grads * (3 + 1 / num_passes) * per_gradient + outer
