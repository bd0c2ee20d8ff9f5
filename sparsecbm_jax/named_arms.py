"""The arms that the intervention suite compares, by name: the one place to add another."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from sparsecbm_jax import arms
from sparsecbm_jax.arms import Arm, Outcome, State
from sparsecbm_jax.cbm import CBMConfig
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.guards import fisher_guard
from sparsecbm_jax.logs import progress
from sparsecbm_jax.minimal import Guard


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
        num_concepts = self.config.num_concepts
        bar = progress(description="guards", total=num_concepts * len(self.batches), unit="gradient")
        move = functools.partial(bar.update, 1)
        made = {
            k: fisher_guard(self.config, *self.state, self.batches, k, on_gradient=move) for k in range(num_concepts)
        }
        bar.close()
        return made


def _no_correction(config: CBMConfig, state: State, batch: Batch, concept: int, target: int) -> Outcome:
    return Outcome(state, 0, False)


def _oracle(config: CBMConfig, state: State, batch: Batch, concept: int, target: int) -> Outcome:
    """Sets the activation of the text at hand, and leaves a model that has learnt nothing."""
    return Outcome(state, 0, True)


class NamedArm(NamedTuple):
    """An arm by name: what tables call it, and how it is made for a stream from (kit, order seed)."""

    title: str
    make: Callable[[Kit, int], Arm]


ARMS: Mapping[str, NamedArm] = {
    "none": NamedArm("no correction", lambda kit, seed: _no_correction),
    "minimal": NamedArm("smallest edit", lambda kit, seed: arms.minimal()),
    "guarded": NamedArm("smallest edit, guarded", lambda kit, seed: arms.minimal(kit.guards)),
    "guarded_margin": NamedArm("the same, margin 1", lambda kit, seed: arms.minimal(kit.guards, margin=1.0)),
    "magnitude": NamedArm("magnitude (paper), 1 %", lambda kit, seed: arms.fixed_share("magnitude", 0.01)),
    "random": NamedArm("random, 1 %", lambda kit, seed: arms.random_share(0.01, seed)),
    "projector": NamedArm("SGD on the projector", lambda kit, seed: arms.projector_sgd(0.05)),
    "fine_tune": NamedArm("SGD on the backbone", lambda kit, seed: arms.fine_tune(1e-3)),
    "oracle": NamedArm("oracle activation", lambda kit, seed: _oracle),
    "wrong_label": NamedArm("smallest edit, wrong label", lambda kit, seed: arms.wrong_label(arms.minimal())),
}


# How a share of the weights, given beforehand, is chosen, from (share, seed); 'none' is for a share of 0.
RANKINGS: Mapping[str, Callable[[float, int], Arm]] = {
    "none": lambda share, seed: _no_correction,
    "magnitude": lambda share, seed: arms.fixed_share("magnitude", share),
    "signed": lambda share, seed: arms.fixed_share("signed", share),
    "random": arms.random_share,
}
