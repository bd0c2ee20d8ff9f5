"""The arms that the intervention suite compares, by name: the one place to add another."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sparsecbm_jax.core.masks import Masks
from sparsecbm_jax.core.trees import Params
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.evaluation.editing.baselines import fine_tune, projector_sgd, random_share, wrong_label
from sparsecbm_jax.intervention.edit_costs import fisher_costs, logit_directions, sharpen
from sparsecbm_jax.intervention.editors import Editor, Outcome, continual, fixed_size, minimal, rehearsed
from sparsecbm_jax.intervention.ranking import EditCosts
from sparsecbm_jax.model.config import CBMConfig, Heads
from sparsecbm_jax.model.sparse_cbm import ModelArrays
from sparsecbm_jax.runtime.progress import progress


@dataclasses.dataclass(frozen=True, eq=False)
class EditorContext:
    """What arms are made of.

    Attributes:
        config, state: the model before any correction.
        batches: training texts with their gold concepts.
    """

    config: CBMConfig
    state: ModelArrays
    batches: Sequence[Batch]

    @functools.cached_property
    def guards(self) -> dict[int, EditCosts]:
        """Of each concept, what a change costs the training texts; made when an arm first asks."""
        with self._bar("guards", 1) as bar:
            move = functools.partial(bar.update, 1)
            return {k: fisher_costs(*self._arrays, self.batches, k, on_gradient=move) for k in self._concepts}

    @functools.cached_property
    def steep_guards(self) -> dict[int, EditCosts]:
        """The same, dearer where texts are moved more."""
        return {k: sharpen(guard) for k, guard in self.guards.items()}

    @functools.cached_property
    def sparing_guards(self) -> dict[int, EditCosts]:
        """The steep ones, with the logits of training texts to be left alone."""
        made = {}
        with self._bar("logits to be spared", self.config.num_classes) as bar:
            move = functools.partial(bar.update, 1)
            for k, guard in self.steep_guards.items():
                directions = logit_directions(*self._arrays, self.batches, k, on_gradient=move)
                made[k] = guard._replace(directions=directions)
        return made

    @property
    def _arrays(self) -> tuple[CBMConfig, Params, Masks, Heads]:
        return self.config, self.state.params, self.state.masks, self.state.heads

    @property
    def _concepts(self) -> range:
        return range(self.config.num_concepts)

    def _bar(self, description: str, per_batch: int) -> contextlib.closing[Any]:
        total = self.config.num_concepts * len(self.batches) * per_batch
        return contextlib.closing(progress(description=description, total=total, unit="gradient"))


def _no_correction(config: CBMConfig, state: ModelArrays, batch: Batch, concept: int, target: int) -> Outcome:
    return Outcome(state, 0, False)


def _oracle(config: CBMConfig, state: ModelArrays, batch: Batch, concept: int, target: int) -> Outcome:
    """Counts the text as right, as where its activation is set by hand, and leaves the model as it was."""
    return Outcome(state, 0, True)


class NamedEditor(NamedTuple):
    """An arm by name: what tables call it, and how it is made for a stream from (kit, order seed)."""

    title: str
    make: Callable[[EditorContext, int], Editor]


def _continual(title: str, *, is_guarded: bool = True, **settings: Any) -> NamedEditor:
    def make(kit: EditorContext, seed: int) -> Editor:
        return continual(kit.steep_guards if is_guarded else None, kit.batches, seed=seed, **settings)

    return NamedEditor(title, make)


EDITORS: Mapping[str, NamedEditor] = {
    "none": NamedEditor("no correction", lambda kit, seed: _no_correction),
    "minimal": NamedEditor("smallest edit", lambda kit, seed: minimal()),
    "guarded": NamedEditor("smallest edit, guarded", lambda kit, seed: minimal(kit.guards)),
    "guarded_margin": NamedEditor("the same, margin 1", lambda kit, seed: minimal(kit.guards, margin=1.0)),
    "sparing": NamedEditor(
        "smallest edit, sparing, margin 0.3", lambda kit, seed: minimal(kit.sparing_guards, margin=0.3)
    ),
    "rehearsed": NamedEditor(
        "sparing, margin 1, rehearsed", lambda kit, seed: rehearsed(kit.sparing_guards, margin=1.0)
    ),
    "lasting": _continual("all corrections together, anchored"),
    "magnitude": NamedEditor("magnitude (paper), 1 %", lambda kit, seed: fixed_size("magnitude", 0.01)),
    "random": NamedEditor("random, 1 %", lambda kit, seed: random_share(0.01, seed)),
    "projector": NamedEditor("SGD on the projector", lambda kit, seed: projector_sgd(0.05)),
    "fine_tune": NamedEditor("SGD on the backbone", lambda kit, seed: fine_tune(1e-3)),
    "oracle": NamedEditor("oracle activation", lambda kit, seed: _oracle),
    "wrong_label": NamedEditor("smallest edit, wrong label", lambda kit, seed: wrong_label(minimal())),
}


# Lasting edits with one or two settings other than the default: what each setting does. Run where they are named.
VARIANTS: Mapping[str, NamedEditor] = {
    "lasting_slack": _continual("together, λ 1, margin 1", strength=1.0, margin=1.0),
    "lasting_tight": _continual("together, λ 4", strength=4.0),
    "lasting_free": _continual("together, λ 0: no anchors", strength=0.0),
    "lasting_unguarded": _continual("together, no guard", is_guarded=False),
    "lasting_short": _continual("together, 4 rounds", max_rounds=4),
    "lasting_wide": _continual("together, 128 texts", num_rows=128),
}
NAMED_EDITORS: Mapping[str, NamedEditor] = {**EDITORS, **VARIANTS}


# How a share of the weights, given beforehand, is chosen, from (share, seed); 'none' is for a share of 0.
RANKINGS: Mapping[str, Callable[[float, int], Editor]] = {
    "none": lambda share, seed: _no_correction,
    "magnitude": lambda share, seed: fixed_size("magnitude", share),
    "signed": lambda share, seed: fixed_size("signed", share),
    "random": random_share,
}
