"""The arms that the intervention suite compares, by name: the one place to add another."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sparsecbm_jax import arms
from sparsecbm_jax.arms import Arm, Outcome, State
from sparsecbm_jax.cbm import CBMConfig, Heads
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.guards import fisher_guard, logit_directions, steep
from sparsecbm_jax.intervention import Guard
from sparsecbm_jax.logs import progress
from sparsecbm_jax.masks import Masks, Params


@dataclasses.dataclass(frozen=True, eq=False)
class Kit:
    """What arms are made of.

    Attributes:
      config, state: the model before any correction.
      batches: training texts with their gold concepts.
    """

    config: CBMConfig
    state: State
    batches: Sequence[Batch]

    @functools.cached_property
    def guards(self) -> dict[int, Guard]:
        """Of each concept, what a change costs the training texts; made when an arm first asks."""
        with self._bar("guards", 1) as bar:
            move = functools.partial(bar.update, 1)
            return {k: fisher_guard(*self._arrays, self.batches, k, on_gradient=move) for k in self._concepts}

    @functools.cached_property
    def steep_guards(self) -> dict[int, Guard]:
        """The same, dearer where texts are moved more."""
        return {k: steep(guard) for k, guard in self.guards.items()}

    @functools.cached_property
    def sparing_guards(self) -> dict[int, Guard]:
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


def _no_correction(config: CBMConfig, state: State, batch: Batch, concept: int, target: int) -> Outcome:
    return Outcome(state, 0, False)


def _oracle(config: CBMConfig, state: State, batch: Batch, concept: int, target: int) -> Outcome:
    """Counts the text as right, as where its activation is set by hand, and leaves the model as it was."""
    return Outcome(state, 0, True)


class NamedArm(NamedTuple):
    """An arm by name: what tables call it, and how it is made for a stream from (kit, order seed)."""

    title: str
    make: Callable[[Kit, int], Arm]


def _lasting(title: str, *, is_guarded: bool = True, **settings: Any) -> NamedArm:
    def make(kit: Kit, seed: int) -> Arm:
        return arms.lasting(kit.steep_guards if is_guarded else None, kit.batches, seed=seed, **settings)

    return NamedArm(title, make)


ARMS: Mapping[str, NamedArm] = {
    "none": NamedArm("no correction", lambda kit, seed: _no_correction),
    "minimal": NamedArm("smallest edit", lambda kit, seed: arms.minimal()),
    "guarded": NamedArm("smallest edit, guarded", lambda kit, seed: arms.minimal(kit.guards)),
    "guarded_margin": NamedArm("the same, margin 1", lambda kit, seed: arms.minimal(kit.guards, margin=1.0)),
    "sparing": NamedArm(
        "smallest edit, sparing, margin 0.3", lambda kit, seed: arms.minimal(kit.sparing_guards, margin=0.3)
    ),
    "rehearsed": NamedArm(
        "sparing, margin 1, rehearsed", lambda kit, seed: arms.rehearsed(kit.sparing_guards, margin=1.0)
    ),
    "lasting": _lasting("all corrections together, anchored"),
    "magnitude": NamedArm("magnitude (paper), 1 %", lambda kit, seed: arms.fixed_share("magnitude", 0.01)),
    "random": NamedArm("random, 1 %", lambda kit, seed: arms.random_share(0.01, seed)),
    "projector": NamedArm("SGD on the projector", lambda kit, seed: arms.projector_sgd(0.05)),
    "fine_tune": NamedArm("SGD on the backbone", lambda kit, seed: arms.fine_tune(1e-3)),
    "oracle": NamedArm("oracle activation", lambda kit, seed: _oracle),
    "wrong_label": NamedArm("smallest edit, wrong label", lambda kit, seed: arms.wrong_label(arms.minimal())),
}


# Lasting edits with one or two settings other than the default: what each setting does. Run where they are named.
VARIANTS: Mapping[str, NamedArm] = {
    "lasting_slack": _lasting("together, λ 1, margin 1", strength=1.0, margin=1.0),
    "lasting_tight": _lasting("together, λ 4", strength=4.0),
    "lasting_free": _lasting("together, λ 0: no anchors", strength=0.0),
    "lasting_unguarded": _lasting("together, no guard", is_guarded=False),
    "lasting_short": _lasting("together, 4 rounds", max_rounds=4),
    "lasting_wide": _lasting("together, 128 texts", num_rows=128),
}
NAMED: Mapping[str, NamedArm] = {**ARMS, **VARIANTS}


# How a share of the weights, given beforehand, is chosen, from (share, seed); 'none' is for a share of 0.
RANKINGS: Mapping[str, Callable[[float, int], Arm]] = {
    "none": lambda share, seed: _no_correction,
    "magnitude": lambda share, seed: arms.fixed_share("magnitude", share),
    "signed": lambda share, seed: arms.fixed_share("signed", share),
    "random": arms.random_share,
}
