"""Editors: methods of making one correction, behind one type, so that all are used, served and measured alike.

An editor is a function of the model's arrays and a correction; it returns the new arrays and the edit. The editors here
change the corrected concept's mask: by a given number of weights, by as few weights as repair the concept, or so that
earlier corrections are retained. An editor of your own is a function of the same signature; as a frozen dataclass with
fields for its settings, it also has a name and settings in every report.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.intervention.continual_edit import DEFAULTS, ContinualSettings, continual_edit
from sparsecbm_jax.intervention.edit_costs import fisher_costs, sharpen
from sparsecbm_jax.intervention.fixed_size_edit import intervene
from sparsecbm_jax.intervention.mask_edit import ConceptCorrection, MaskEdit, edit_of
from sparsecbm_jax.intervention.minimal_edit import minimal_edit
from sparsecbm_jax.intervention.ranking import EditCosts, SaliencyFn
from sparsecbm_jax.intervention.replay import Replay
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.forward import concept_logits
from sparsecbm_jax.model.losses import least_margin
from sparsecbm_jax.model.sparse_cbm import ModelArrays

Editor = Callable[[CBMConfig, ModelArrays, ConceptCorrection], tuple[ModelArrays, MaskEdit]]
"""(config, arrays, correction) → (the new arrays, the edit with the outputs before and after)."""


@dataclasses.dataclass(frozen=True)
class FixedSize:
    """An editor that drops and grows a given share of the backbone's weights, as the paper does.

    Attributes:
        drop_fraction: Share of the maskable weights that each step drops and grows, in [0, 1].
        saliency: 'signed', 'magnitude' (the paper's) or a function; see `ranking.SaliencyFn`.
        num_steps: Number of steps, at least 1; each differentiates and edits.

    Reference: Tan et al. 2024, 'Sparsity-based Inference-time intervention'.
    """

    drop_fraction: float = 1e-4
    saliency: str | SaliencyFn = "signed"
    num_steps: int = 1

    def __call__(
        self, config: CBMConfig, arrays: ModelArrays, correction: ConceptCorrection
    ) -> tuple[ModelArrays, MaskEdit]:
        """Edits the mask; see `fixed_size_edit.intervene`."""
        masks, edit = intervene(
            config, arrays, correction, self.drop_fraction, saliency=self.saliency, num_steps=self.num_steps
        )
        return arrays._replace(masks=masks), edit


@dataclasses.dataclass(frozen=True)
class Minimal:
    """An editor that drops and grows as few weights as repair the concept.

    It leaves the mask as it is where `max_pairs` do not suffice.

    Attributes:
        margin: Logits by which the requested class has to lead, at least 0.
        costs: Costs of a change for other texts, by concept; None counts every weight alike.
        max_pairs: Most pairs of weights that are tried, at least 1.
    """

    margin: float = 0.0
    costs: Mapping[int, EditCosts] | None = dataclasses.field(default=None, repr=False)
    max_pairs: int = 4096

    def __call__(
        self, config: CBMConfig, arrays: ModelArrays, correction: ConceptCorrection
    ) -> tuple[ModelArrays, MaskEdit]:
        """Edits the mask; see `minimal_edit.minimal_edit`."""
        masks, found = minimal_edit(
            config,
            arrays,
            correction,
            margin=self.margin,
            costs=None if self.costs is None else self.costs[int(correction.concept)],
            max_pairs=self.max_pairs,
        )
        return arrays._replace(masks=masks), found.edit


@dataclasses.dataclass(frozen=True)
class Continual:
    """An editor whose edit is for the correction, the earlier ones, and anchors, which stay as before any correction.

    Earlier corrections are those in `ConceptCorrection.earlier`. The costs of weights and the logits of the anchors are
    computed when a concept is first corrected, and stored.

    Attributes:
        anchors: Training texts with their gold concepts.
        original: The model before any correction, whose logits the anchors retain; None takes the first model that is
            edited.
        costs: Costs of a change for other texts, by concept; 'fisher' computes them from the anchors, None counts every
            weight alike.
        margin, strength, max_rounds: See `ContinualSettings`.
        num_rows: Texts of one edit, at least 4; at most half of them are corrections.
        seed: Seed of the draw of texts.
        on_gradient: Called for each of the anchors' batches, once for each concept that is corrected.

    Raises:
        ValueError: There are no anchors, or `num_rows` is too small.
    """

    anchors: Sequence[Batch] = dataclasses.field(repr=False)
    original: ModelArrays | None = dataclasses.field(default=None, repr=False)
    costs: Mapping[int, EditCosts] | Literal["fisher"] | None = dataclasses.field(default="fisher", repr=False)
    margin: float = float(DEFAULTS.margin)
    strength: float = float(DEFAULTS.strength)
    max_rounds: int = int(DEFAULTS.max_rounds)
    num_rows: int = 64
    seed: int = 0
    on_gradient: Callable[[], object] = dataclasses.field(default=lambda: None, repr=False)
    # Computed once for each concept; not settings of the editor.
    _replay: Replay = dataclasses.field(init=False, repr=False, compare=False)
    _fisher: dict[int, EditCosts] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # The class is frozen.
        object.__setattr__(self, "_replay", Replay(self.anchors, num_rows=self.num_rows, seed=self.seed))

    def __call__(
        self, config: CBMConfig, arrays: ModelArrays, correction: ConceptCorrection
    ) -> tuple[ModelArrays, MaskEdit]:
        """Edits the mask; see `continual_edit.continual_edit`."""
        concept = int(correction.concept)
        original = arrays if self.original is None else self.original
        replay = self._replay.emptied()
        replay.hold(concept, lambda texts: concept_logits(config, original, texts, concept))
        for one in (*correction.earlier, correction):
            replay.add(int(one.concept), one.batch, int(one.target))
        masks, _ = continual_edit(
            config,
            arrays,
            concept,
            replay.texts(concept),
            costs=self._costs_of(config, original, concept),
            settings=ContinualSettings(self.margin, self.strength, self.max_rounds),
        )
        new = arrays._replace(masks=masks)
        return new, edit_of(config, arrays, new, correction._replace(label=None))

    def _costs_of(self, config: CBMConfig, original: ModelArrays, concept: int) -> EditCosts | None:
        if self.costs is None:
            return None
        if not isinstance(self.costs, str):
            return self.costs[concept]
        if concept not in self._fisher:
            costs = fisher_costs(config, original, self.anchors, concept, on_gradient=self.on_gradient)
            self._fisher[concept] = sharpen(costs)
        return self._fisher[concept]


@dataclasses.dataclass(frozen=True)
class Rehearsed:
    """An editor of minimal edits: one for the correction, then others for the earlier one of least margin.

    It ends when all corrected texts have their targets, or after `max_rounds` edits.

    Attributes:
        minimal: The editor that makes each edit.
        max_rounds: Most edits, at least 1.
    """

    minimal: Minimal = Minimal()
    max_rounds: int = 8

    def __call__(
        self, config: CBMConfig, arrays: ModelArrays, correction: ConceptCorrection
    ) -> tuple[ModelArrays, MaskEdit]:
        """Edits the mask; see the class."""
        same = [one for one in correction.earlier if int(one.concept) == int(correction.concept)]
        cells = [*same, correction]
        new, worst = arrays, len(cells) - 1
        for _ in range(self.max_rounds):
            new, _ = self.minimal(config, new, cells[worst])
            margins = [_margin(config, new, one) for one in cells]
            worst = int(np.argmin(margins))
            if margins[worst] > 0:
                break
        return new, edit_of(config, arrays, new, correction._replace(label=None))


def fixed_size(drop_fraction: float = 1e-4, saliency: str | SaliencyFn = "signed", num_steps: int = 1) -> FixedSize:
    """Returns the editor that changes a given share of the weights; see `FixedSize`.

    Args:
        drop_fraction: As for `FixedSize`.
        saliency: As for `FixedSize`.
        num_steps: As for `FixedSize`.

    >>> fixed_size(0.001)
    FixedSize(drop_fraction=0.001, saliency='signed', num_steps=1)
    """
    return FixedSize(drop_fraction, saliency, num_steps)


def minimal(*, margin: float = 0.0, costs: Mapping[int, EditCosts] | None = None, max_pairs: int = 4096) -> Minimal:
    """Returns the editor that changes as few weights as repair the concept; see `Minimal`.

    Args:
        margin: As for `Minimal`.
        costs: As for `Minimal`.
        max_pairs: As for `Minimal`.

    >>> minimal(margin=0.5)
    Minimal(margin=0.5, max_pairs=4096)
    """
    return Minimal(margin, costs, max_pairs)


def continual(anchors: Sequence[Batch], **settings: Any) -> Continual:
    """Returns the editor that retains earlier corrections.

    Args:
        anchors: Training texts with their gold concepts.
        **settings: The other attributes of `Continual`.

    Raises:
        ValueError: As `Continual`.
    """
    return Continual(anchors, **settings)


def describe(editor: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """Returns an editor's name in reports, and its settings as plain data.

    The settings are those fields of a dataclass that its `repr` shows; a function has only a name.

    >>> describe(minimal(margin=0.5))
    ('minimal', {'margin': 0.5, 'max_pairs': 4096})
    """
    if not dataclasses.is_dataclass(editor) or isinstance(editor, type):
        return getattr(editor, "__name__", type(editor).__name__), {}
    words = [f"_{char.lower()}" if char.isupper() else char for char in type(editor).__name__]
    settings = {field.name: _plain(getattr(editor, field.name)) for field in dataclasses.fields(editor) if field.repr}
    return "".join(words).lstrip("_"), settings


def _plain(value: Any) -> Any:
    if isinstance(value, str | bool | int | float | type(None)):
        return value
    if dataclasses.is_dataclass(value) and callable(value):
        name, settings = describe(value)
        return {"name": name, **settings}
    return getattr(value, "__name__", repr(value))


def is_repaired(edit: MaskEdit, example_weight: Any) -> bool:
    """Returns True where every corrected row has the requested class after an edit.

    Args:
        edit: The edit, with the outputs after it.
        example_weight: Weight of each row; rows of weight 0 do not count.
    """
    logits = edit.concept_logits_after[:, edit.concept]
    return bool(least_margin(logits, edit.target, jnp.asarray(example_weight)) > 0)


def _margin(config: CBMConfig, arrays: ModelArrays, correction: ConceptCorrection) -> float:
    batch = correction.batch
    logits = concept_logits(config, arrays, batch, correction.concept)
    return float(least_margin(logits, jnp.full(logits.shape[0], correction.target), batch.example_weight))
