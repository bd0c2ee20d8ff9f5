"""The editors that the intervention suite compares, by name. A new editor is added here alone."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.evaluation.editing.baselines import (
    Oracle,
    fine_tune,
    no_correction,
    projector_sgd,
    random_share,
    wrong_label,
)
from sparsecbm_jax.intervention.edit_costs import fisher_costs, logit_directions, sharpen
from sparsecbm_jax.intervention.editors import Editor, Rehearsed, continual, fixed_size, minimal
from sparsecbm_jax.intervention.ranking import EditCosts
from sparsecbm_jax.model.config import CBMConfig
from sparsecbm_jax.model.sparse_cbm import ModelArrays
from sparsecbm_jax.runtime.progress import progress


@dataclasses.dataclass(frozen=True, eq=False)
class EditorContext:
    """The model and texts that editors are made from.

    Attributes:
        config, arrays: The model before any correction.
        batches: Training texts with their gold concepts.
        class_activations: What a concept that is set to a class is given; see `SparseCBM.class_activations`.
    """

    config: CBMConfig
    arrays: ModelArrays
    batches: Sequence[Batch]
    class_activations: Float[np.ndarray, "K C C"]

    @functools.cached_property
    def costs(self) -> dict[int, EditCosts]:
        """Costs of a change for the training texts, by concept; computed at their first use."""
        with self._bar("costs of changes", 1) as bar:
            move = functools.partial(bar.update, 1)
            return {
                k: fisher_costs(self.config, self.arrays, self.batches, k, on_gradient=move) for k in self._concepts
            }

    @functools.cached_property
    def sharp_costs(self) -> dict[int, EditCosts]:
        """The same costs, sharpened: see `edit_costs.sharpen`."""
        return {k: sharpen(costs) for k, costs in self.costs.items()}

    @functools.cached_property
    def projected_costs(self) -> dict[int, EditCosts]:
        """The sharpened costs, with directions that project out changes of the training texts' logits."""
        made = {}
        with self._bar("directions of logits", self.config.num_classes) as bar:
            move = functools.partial(bar.update, 1)
            for k, costs in self.sharp_costs.items():
                directions = logit_directions(self.config, self.arrays, self.batches, k, on_gradient=move)
                made[k] = costs._replace(directions=directions)
        return made

    @property
    def _concepts(self) -> range:
        return range(self.config.num_concepts)

    def _bar(self, description: str, per_batch: int) -> contextlib.closing[Any]:
        total = self.config.num_concepts * len(self.batches) * per_batch
        return contextlib.closing(progress(description=description, total=total, unit="gradient"))


class NamedEditor(NamedTuple):
    """A named editor: its title in tables, and a function that makes it for a sequence from (context, order seed)."""

    title: str
    make: Callable[[EditorContext, int], Editor]


def _continual(title: str, *, has_costs: bool = True, **settings: Any) -> NamedEditor:
    def make(context: EditorContext, seed: int) -> Editor:
        costs = context.sharp_costs if has_costs else None
        return continual(context.batches, original=context.arrays, costs=costs, seed=seed, **settings)

    return NamedEditor(title, make)


EDITORS: Mapping[str, NamedEditor] = {
    "none": NamedEditor("no correction", lambda context, seed: no_correction),
    "minimal": NamedEditor("minimal", lambda context, seed: minimal()),
    "costed": NamedEditor("minimal, with costs", lambda context, seed: minimal(costs=context.costs)),
    "costed_margin": NamedEditor(
        "minimal, with costs, margin 1", lambda context, seed: minimal(costs=context.costs, margin=1.0)
    ),
    "sparing": NamedEditor(
        "minimal, projected out, margin 0.3",
        lambda context, seed: minimal(costs=context.projected_costs, margin=0.3),
    ),
    "rehearsed": NamedEditor(
        "the same, margin 1, rehearsed",
        lambda context, seed: Rehearsed(minimal(costs=context.projected_costs, margin=1.0)),
    ),
    "continual": _continual("continual"),
    "magnitude": NamedEditor("fixed size 1 %, magnitude (paper)", lambda context, seed: fixed_size(0.01, "magnitude")),
    "random": NamedEditor("random, 1 %", lambda context, seed: random_share(0.01, seed)),
    "projector": NamedEditor("SGD on the projector", lambda context, seed: projector_sgd(0.05)),
    "fine_tune": NamedEditor("SGD on the backbone", lambda context, seed: fine_tune(1e-3)),
    "oracle": NamedEditor("oracle activation", lambda context, seed: Oracle(context.class_activations)),
    "wrong_label": NamedEditor("minimal, wrong label", lambda context, seed: wrong_label(minimal())),
}


# Continual edits with one or two settings that differ from the default, to show their effects; run only if named.
VARIANTS: Mapping[str, NamedEditor] = {
    "continual_slack": _continual("continual, λ 1, margin 1", strength=1.0, margin=1.0),
    "continual_tight": _continual("continual, λ 4", strength=4.0),
    "continual_free": _continual("continual, λ 0: no anchors", strength=0.0),
    "continual_uncosted": _continual("continual, no costs", has_costs=False),
    "continual_short": _continual("continual, 4 rounds", max_rounds=4),
    "continual_wide": _continual("continual, 128 texts", num_rows=128),
}
NAMED_EDITORS: Mapping[str, NamedEditor] = {**EDITORS, **VARIANTS}


# Rankings that choose a given share of the weights, from (share, seed); 'none' is for a share of 0.
RANKINGS: Mapping[str, Callable[[float, int], Editor]] = {
    "none": lambda share, seed: no_correction,
    "magnitude": lambda share, seed: fixed_size(share, "magnitude"),
    "signed": lambda share, seed: fixed_size(share, "signed"),
    "random": random_share,
}
