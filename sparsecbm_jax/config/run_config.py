"""Settings of a run: frozen dataclasses, and the one way from a ConfigDict, a dict or a JSON file to them.

Nothing here imports beyond the standard library, so that every package may take these types. A misspelt key, a wrong
type or a value out of range raises here, before anything is loaded, naming the full dotted key and what was expected.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from sparsecbm_jax.config.names import did_you_mean
from sparsecbm_jax.config.validation import (
    FRACTION,
    FRACTIONS,
    NON_EMPTY,
    NON_NEGATIVE,
    NON_NEGATIVE_INT,
    POSITIVE,
    POSITIVE_INT,
    Check,
    T,
    field_types,
    full_key,
    one_of,
    setting,
    settle,
)

STRATEGIES = ("standard", "independent", "sequential", "joint", "sparse")
DTYPES = ("float32", "bfloat16")
CRITERIA = (
    "woodfisher",
    "combinatorial",
    "magnitude",
    "random",
    "snip",
    "movement",
    "taylor",
    "diagonal_fisher",
    "wanda",
    "m_fac",
)
ACTIVATIONS = ("log_odds", "centred", "sigmoid")
PATTERNS = ("1", "4", "8", "16", "block", "greedy", "2:4")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Texts and labels, and how they are read. A preset fills in columns and classes; other fields go first."""

    section: typing.ClassVar[str] = "data"

    preset: str = setting("sample", NON_EMPTY)
    """Known data set: 'sample' and 'synthetic' (embedded, 600 and 2,800 reviews by a grammar), 'cebab',
    'cebab_augmented', 'imdb_c_manual', 'imdb_c_generated', or 'columns' (files of your own, read by the columns named
    below)."""
    path: str | None = None
    """Local directory or file (JSON, CSV, JSONL, Parquet). None: the preset's hub name, or the embedded texts."""
    name: str | None = None
    """Hub name to load through `datasets`. None: the preset's own."""
    train_split: str | None = None
    """Split name, or file name under `path`, of the training rows. None: the preset's."""
    validation_split: str | None = None
    """Split name or file name of the validation rows. None: the preset's."""
    test_split: str | None = None
    """Split name or file name of the test rows. None: the preset's."""
    text_column: str | None = None
    """Column that holds the text. None: the preset's."""
    label_column: str | None = None
    """Column that holds the task label. None: the preset's."""
    concept_columns: tuple[str, ...] = ()
    """Columns of the K concepts, in order. Empty: the preset's."""
    concepts: tuple[str, ...] = ()
    """Names shown for the concepts, as many as `concept_columns`. Empty: the preset's, else the column names."""
    classes: tuple[str, ...] = ()
    """Names of the C classes of every concept. Empty: the preset's (Negative, Positive, unknown)."""
    labels: tuple[str, ...] = ()
    """Names of the Y task labels, in order. Empty: the preset's."""
    group_column: str | None = None
    """Column whose equal values must not fall into two splits (an edited review's original). None: the preset's."""
    missing_as_unknown: bool = True
    """Whether an empty concept cell counts as class 'unknown' (the paper's reading) or carries no loss and no score."""
    keep_unlabelled: bool = False
    """Whether training rows without a task label are kept for the concept loss alone, or skipped."""
    max_length: int = setting(512, Check("an integer of at least 3", lambda v: v >= 3))
    """Longest text in tokens, special tokens included; longer ones are cut, at the backbone's last position too."""

    def __post_init__(self) -> None:
        settle(self)
        if self.concepts and self.concept_columns and len(self.concepts) != len(self.concept_columns):
            raise ValueError(
                f"config.data.concepts has {len(self.concepts)} names {self.concepts!r}, but "
                f"config.data.concept_columns has {len(self.concept_columns)}; expected one name for each column"
            )


@dataclasses.dataclass(frozen=True)
class BackboneChoice:
    """The pretrained encoder or decoder, and how it computes."""

    section: typing.ClassVar[str] = "backbone"

    name: str = setting("minilm", NON_EMPTY)
    """'minilm' (the weights of the installed package), 'tiny' (small random BERT with a vocabulary made from the
    training texts), a hub name, or a local directory of the hub's layout."""
    dtype: str = setting("float32", one_of(*DTYPES))
    """Type of the computation; parameters stay float32."""
    remat: str = setting("none", one_of("none", "selective", "full"))
    """What of a layer is computed again in the backward pass to save memory: 'none', 'selective' (all but what its
    kernels give), 'full'."""
    dropout: float | None = setting(None, FRACTION)
    """Dropout rate while training, in [0, 1). None: the checkpoint's own."""

    def __post_init__(self) -> None:
        settle(self)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Adam (AdamW where weight_decay > 0) with warm-up."""

    section: typing.ClassVar[str] = "optim"

    learning_rate: float = setting(5e-5, POSITIVE)
    """Peak learning rate of the backbone."""
    head_learning_rate: float = setting(1e-2, POSITIVE)
    """Peak learning rate of the concept projector and the label predictor."""
    weight_decay: float = setting(0.0, NON_NEGATIVE)
    """Decoupled weight decay of kernels and embeddings, per unit of learning rate."""
    warmup_fraction: float = setting(0.06, FRACTION)
    """Share of all steps over which the learning rates climb from 0, in [0, 1)."""
    decay: str = setting("linear", one_of("linear", "constant"))
    """What the learning rates do after the warm-up: fall to 0 at the last step, or stay."""
    clip_norm: float = setting(1.0, POSITIVE)
    """Largest global norm of the gradients; longer ones are scaled down."""
    rewind: bool = False
    """Whether each pruning event begins the learning rates' schedule again, which ends at the next event."""
    sparse_learning_rate: float | None = setting(None, POSITIVE)
    """Peak learning rate of the backbone from the first pruning event on. None: `learning_rate`."""

    def __post_init__(self) -> None:
        settle(self)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The training loop: its length, its batches, its checkpoints."""

    section: typing.ClassVar[str] = "training"

    num_epochs: int = setting(20, POSITIVE_INT)
    """Passes over the training rows."""
    batch_size: int = setting(8, POSITIVE_INT)
    """Examples in a step over all devices."""
    eval_batch_size: int = setting(32, POSITIVE_INT)
    """Examples in an evaluation step over all devices."""
    patience: int | None = setting(None, POSITIVE_INT)
    """Epochs without a better validation score before stopping, counted at the final sparsity. None: never."""
    save_every_steps: int | None = setting(None, POSITIVE_INT)
    """Steps between mid-epoch checkpoints. None: at the end of each epoch only."""
    keep_checkpoints: int = setting(2, POSITIVE_INT)
    """Checkpoints kept for resuming, the latest ones."""
    log_every_steps: int = setting(10, POSITIVE_INT)
    """Steps between lines of the metrics log."""

    def __post_init__(self) -> None:
        settle(self)


@dataclasses.dataclass(frozen=True)
class PredictorConfig:
    """The label predictor: what it reads of a concept, and how it is finished once training has ended."""

    section: typing.ClassVar[str] = "predictor"

    activation: str = setting("log_odds", one_of(*ACTIVATIONS))
    """What the label reads of a concept's logits u: 'log_odds', (u - mean u) / 10, or 'centred', σ(u - mean u), both
    functions of the class probabilities; 'sigmoid', σ(u), the paper's, which also carries the mean of the logits, that
    no probability shows."""
    is_finished: bool = True
    """Whether concepts are calibrated on the validation split at the end, and φ is fitted there to the optimum, where
    cross-validation prefers that to the φ of training. Strategy 'independent' fits φ on gold concepts in any case."""

    accepted_risk: float = setting(0.2, Check("a number in [0, 1]", lambda v: 0 <= v <= 1))
    """Share of incorrect predictions, on the validation split, that is accepted among those that are not marked as
    unsure: of each concept, and of the label. 1 marks none."""

    def __post_init__(self) -> None:
        settle(self)


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """Learning from the dense model that a sparse run had before its first pruning event."""

    section: typing.ClassVar[str] = "distillation"

    weight: float = setting(0.0, Check("a number in [0, 1]", lambda v: 0 <= v <= 1))
    """Share of the loss that is the distance from the dense model's probabilities, in place of the labels. 0: none."""
    temperature: float = setting(2.0, POSITIVE)
    """What the logits of both models are divided by before they are compared."""

    def __post_init__(self) -> None:
        settle(self)


@dataclasses.dataclass(frozen=True)
class SparsityConfig:
    """How the pruned fraction of each concept's subnetwork climbs. Read by strategy 'sparse' only."""

    section: typing.ClassVar[str] = "sparsity"

    initial: float = setting(0.2, FRACTION)
    """Pruned fraction at the first event, in [0, 1)."""
    final: float | None = setting(None, FRACTION)
    """Pruned fraction after the last event, in [0, 1). None: 1 - 1/K for K concepts."""
    per_concept: tuple[float, ...] = setting((), FRACTIONS)
    """Final pruned fraction of each concept, in order, in place of `final`. Empty: the same for all."""
    start_epoch: int = setting(2, NON_NEGATIVE_INT)
    """Epoch (from 0) at whose start the first event falls; dense before."""
    end_epoch: int = setting(12, POSITIVE_INT)
    """Epoch at whose start the final sparsity is reached; after start_epoch, and at most num_epochs - 1."""
    schedule: str = setting("cubic", one_of("linear", "cubic", "oneshot"))
    """Shape of the climb between the two epochs."""
    events_per_epoch: int = setting(1, POSITIVE_INT)
    """How often per epoch the masks are scored again."""
    reestimations: int = setting(1, POSITIVE_INT)
    """Cuts that an event is done in, each scored again under the mask that the one before it left."""
    scope: str = setting("global", one_of("global", "per_kernel", "per_row"))
    """Whether weights compete over all kernels of a concept, within each kernel of each layer, or within each output
    unit."""
    allotment: str = setting("equal", one_of("equal", "loss"))
    """Whether all concepts have the sparsity asked for, or have it on average, at equal predicted loss increase."""
    shared_fraction: float = setting(0.0, FRACTION)
    """Share of the pruned weights that is common to all concepts, chosen by the summed score, in [0, 1)."""
    pinned: tuple[str, ...] = ()
    """Kernels that stay whole, by path: layers/query/kernel, or a pattern such as layers/ffn_*/kernel."""
    regrow: bool = False
    """Whether pruned weights may come back at a later event."""

    def __post_init__(self) -> None:
        settle(self)
        if self.end_epoch <= self.start_epoch:
            raise ValueError(
                f"config.sparsity.end_epoch is {self.end_epoch}, but must be above config.sparsity.start_epoch, "
                f"which is {self.start_epoch}"
            )
        for name, setting_of, excluded in (
            ("shared_fraction", self.shared_fraction > 0, self.scope != "global" and f"scope={self.scope!r}"),
            ("allotment='loss'", self.allotment == "loss", self.scope != "global" and f"scope={self.scope!r}"),
            ("allotment='loss'", self.allotment == "loss", self.pinned and "pinned kernels"),
            ("reestimations > 1", self.reestimations > 1, self.regrow and "regrow, which scores the same each time"),
        ):
            if setting_of and excluded:
                raise ValueError(f"config.sparsity.{name} does not go with {excluded}")
        finals = {"final": self.final} if self.final is not None else {}
        finals |= {f"per_concept[{k}]": value for k, value in enumerate(self.per_concept)}
        for name, value in finals.items():
            if value < self.initial:
                raise ValueError(
                    f"config.sparsity.{name} is {value}, but must be at least config.sparsity.initial, "
                    f"which is {self.initial}"
                )


@dataclasses.dataclass(frozen=True)
class PrunerConfig:
    """How weights are scored: by default from the block-wise empirical Fisher."""

    section: typing.ClassVar[str] = "pruner"

    criterion: str = setting("woodfisher", one_of(*CRITERIA))
    """The score; 'magnitude' and 'random' take no gradients, 'combinatorial' exchanges weights after the cut."""
    pattern: str = setting("1", one_of(*PATTERNS))
    """What is pruned together: single weights, 4, 8 or 16 consecutive inputs, whole blocks, 2 of 4; 'greedy': single
    weights, in the order of greedy OBS."""
    num_grads: int = setting(128, POSITIVE_INT)
    """Gradients m in the empirical Fisher of each concept."""
    block_size: int = setting(64, POSITIVE_INT)
    """Consecutive inputs b of one output unit that form a block; a last block that is not filled is padded."""
    grad_batch_size: int = setting(8, POSITIVE_INT)
    """Examples averaged in one gradient, unless `per_example`."""
    damping: float = setting(0.1, POSITIVE)
    """Dampening zeta that is added to the diagonal: a multiple of mean g² (relative) or the value itself (absolute)."""
    damping_mode: str = setting("relative", one_of("relative", "absolute"))
    """How `damping` is read."""
    per_example: bool = False
    """Whether gradients are of single examples (the empirical Fisher) or of minibatches."""
    fisher_memory: int | None = setting(None, POSITIVE_INT)
    """Bytes of a device that pruning may take beside the model and its activations, an eighth of them for compiled
    programs; what gradients and Fisher blocks have no space for takes further passes. None: no limit."""

    def __post_init__(self) -> None:
        settle(self)
        if self.criterion == "combinatorial" and self.pattern != "1":
            raise ValueError(
                "config.pruner.criterion='combinatorial' exchanges single weights; expected config.pruner.pattern='1', "
                f"not {self.pattern!r}"
            )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; their product is the number of devices used."""

    section: typing.ClassVar[str] = "mesh"

    data: int = setting(1, POSITIVE_INT)
    """Parts that the batch is cut into."""
    fsdp: int = setting(1, POSITIVE_INT)
    """Parts that parameters are stored in (and the batch is cut into)."""
    tensor: int = setting(1, POSITIVE_INT)
    """Parts that heads and hidden units are cut into."""
    concept: int = setting(1, POSITIVE_INT)
    """Parts that the K subnetworks are cut into."""

    def __post_init__(self) -> None:
        settle(self)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run, but for where its files go."""

    section: typing.ClassVar[str] = ""

    seed: int = setting(0, NON_NEGATIVE_INT)
    """Decides initial heads, order of examples and dropout."""
    strategy: str = setting("sparse", one_of(*STRATEGIES))
    """How the bottleneck is trained: four dense baselines of the paper, and 'sparse' (SparseCBM)."""
    data: DataConfig = DataConfig()
    backbone: BackboneChoice = BackboneChoice()
    optim: OptimConfig = OptimConfig()
    training: TrainingConfig = TrainingConfig()
    predictor: PredictorConfig = PredictorConfig()
    distillation: DistillationConfig = DistillationConfig()
    sparsity: SparsityConfig = SparsityConfig()
    pruner: PrunerConfig = PrunerConfig()
    mesh: MeshConfig = MeshConfig()
    gamma: float = setting(5.0, NON_NEGATIVE)
    """Weight of the concept loss beside the task loss (Eq. 2)."""

    def __post_init__(self) -> None:
        settle(self)
        epochs = self.training.num_epochs
        if self.strategy == "sparse" and self.sparsity.end_epoch > epochs - 1:
            end = max(1, 2 * epochs // 3)
            raise ValueError(
                f"config.sparsity.end_epoch is {self.sparsity.end_epoch}, but strategy 'sparse' with "
                f"config.training.num_epochs={epochs} expects at most {epochs - 1}, so that at least one epoch trains "
                f"at the final sparsity; {f'start_epoch={end // 2} and end_epoch={end}' if epochs > 1 else '2 epochs'} "
                "would do"
            )
        if self.pruner.criterion == "combinatorial" and self.sparsity.shared_fraction:
            raise ValueError(
                "config.sparsity.shared_fraction does not go with config.pruner.criterion='combinatorial', which "
                "exchanges the weights of each concept by itself"
            )


def from_config_dict(mapping: Mapping[str, Any]) -> RunConfig:
    """Builds a `RunConfig` from nested settings; what is not given keeps its default.

    Args:
        mapping: An ml_collections ConfigDict or a nested dict, as `to_dict` or a JSON file gives it; lists become
            tuples.

    Returns:
        The validated configuration.

    Raises:
        ValueError: A key is unknown (the message has its full dotted name and the nearest valid one), or a value has
            the wrong type or lies out of range (the message has key, value and what was expected).

    >>> from_config_dict({'training': {'batch_size': 4}}).training.batch_size
    4
    >>> from_config_dict({'traning': {'batch_size': 4}})
    Traceback (most recent call last):
    ...
    ValueError: unknown key config.traning; did you mean config.training?
    """
    return _build(RunConfig, completed(mapping))


def completed(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the settings of a run of version 0.1.0 with those by which it goes on as it began.

    They are known by `training.predictor_epochs`, which is gone. Others are returned as they are.
    """
    training = mapping.get("training", {})
    if not isinstance(training, Mapping) or "predictor_epochs" not in training:
        return mapping
    kept = {key: value for key, value in training.items() if key != "predictor_epochs"}
    return {**mapping, "training": kept, "predictor": {"activation": "sigmoid", "is_finished": False}}


def check_batch_sizes(run: RunConfig) -> None:
    """Checks that batches divide over the devices that share their rows.

    Raises:
        ValueError: If they do not.
    """
    rows = run.mesh.data * run.mesh.fsdp
    for name in ("batch_size", "eval_batch_size"):
        if (size := getattr(run.training, name)) % rows:
            raise ValueError(
                f"config.training.{name} is {size}; expected a multiple of {rows}, the devices along mesh.data and "
                "mesh.fsdp"
            )


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns the nested dict that `from_config_dict` turns back into an equal `RunConfig`."""
    return dataclasses.asdict(config)


def key_names(cls: type = RunConfig) -> tuple[str, ...]:
    """Returns the dotted names of all settings and sections, as `--config.NAME` takes them."""
    names: list[str] = []
    for name, hint in field_types(cls).items():
        full = full_key(cls, name)
        names.append(full)
        if dataclasses.is_dataclass(hint):
            names.extend(key_names(typing.cast(type, hint)))
    return tuple(names)


def setting_type(key: str, cls: type = RunConfig) -> Any:
    """Returns the declared type of the setting with this dotted name, one of `key_names()`."""
    name, _, rest = key.partition(".")
    hint = field_types(cls)[name]
    return setting_type(rest, hint) if rest else hint


def unknown_key(key: str) -> str:
    """Returns the message for a setting that does not exist, with the nearest one that does."""
    sections = ", ".join(f"config.{n}" for n in field_types(RunConfig))
    hint = did_you_mean(key, key_names(), "did you mean config.{}?")
    return f"unknown key config.{key}; {hint or f'valid are {sections} and what is below them'}"


def _build(cls: type[T], mapping: Mapping[str, Any]) -> T:
    hints = field_types(cls)
    values: dict[str, Any] = {}
    for name, value in mapping.items():
        full = full_key(cls, str(name))
        if name not in hints:
            raise ValueError(unknown_key(full))
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and not isinstance(value, typing.cast(type, hint)):
            if not hasattr(value, "items"):
                raise ValueError(f"config.{full} is {value!r}; expected a section with keys of its own")
            value = _build(typing.cast(type, hint), value)
        values[name] = value
    return cls(**values)
