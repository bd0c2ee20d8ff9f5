"""The pruning schedule: the steps at which masks are cut, and the sparsities that they reach."""

from typing import NamedTuple

from sparsecbm_jax.config.run_config import SparsityConfig


class PruningEvent(NamedTuple):
    """Scores and cuts masks again: before step `step` of epoch `epoch`, up to the `sparsity` of each concept."""

    epoch: int
    step: int
    sparsity: tuple[float, ...]

    def __str__(self) -> str:
        return " / ".join(f"{value:.2f}" for value in dict.fromkeys(self.sparsity))


def default_sparsity(num_concepts: int) -> float:
    """Computes s = 1 − 1/K: a subnetwork holds at most a K-th of the backbone.

    >>> default_sparsity(4)
    0.75
    """
    return 1 - 1 / num_concepts


def schedule(config: SparsityConfig, num_concepts: int, steps_per_epoch: int) -> list[PruningEvent]:
    """Lists the run's pruning events in order; the last has the final sparsity, at the start of `end_epoch`.

    linear: s_0 + (s_f − s_0) x; cubic: s_f − (s_f − s_0)(1 − x)³; oneshot: one event at `start_epoch`.

    Raises:
        ValueError: if an epoch has fewer steps than events, or not every concept has a sparsity.
    """
    finals = final_sparsity(config, num_concepts)
    if config.schedule == "oneshot":
        return [PruningEvent(config.start_epoch, 0, finals)]
    if config.events_per_epoch > steps_per_epoch:
        raise ValueError(
            f"sparsity.events_per_epoch is {config.events_per_epoch}, but an epoch has {steps_per_epoch} steps"
        )
    total = (config.end_epoch - config.start_epoch) * config.events_per_epoch
    events = []
    for i in range(total + 1):
        x = i / total
        ramp = x if config.schedule == "linear" else 1 - (1 - x) ** 3
        epoch, part = divmod(i, config.events_per_epoch)
        step = part * steps_per_epoch // config.events_per_epoch
        reached = tuple(min(config.initial, final) + (final - min(config.initial, final)) * ramp for final in finals)
        events.append(PruningEvent(config.start_epoch + epoch, step, reached))
    return events


def final_sparsity(config: SparsityConfig, num_concepts: int) -> tuple[float, ...]:
    """Returns the pruned fraction that each concept ends with.

    Raises:
        ValueError: if `config.per_concept` names more or fewer than there are concepts.
    """
    if config.per_concept:
        if len(config.per_concept) != num_concepts:
            raise ValueError(
                f"config.sparsity.per_concept has {len(config.per_concept)} fractions {config.per_concept}, but there "
                f"are {num_concepts} concepts; expected one for each"
            )
        return config.per_concept
    return (default_sparsity(num_concepts) if config.final is None else config.final,) * num_concepts
