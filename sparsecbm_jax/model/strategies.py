"""Training strategies of the paper's Appendix A: what each trains, with which loss, and what follows from that."""

from typing import Literal, NamedTuple

from sparsecbm_jax.model.losses import LossFn, concept_loss, joint_loss, task_loss


class Strategy(NamedTuple):
    """A way to train a model.

    Attributes:
        loss: what the epochs minimise.
        trains: what the epochs train, and so what a model is selected by: concepts, the task or both.
        title: of a model of this strategy, in reports.
        is_sparse: whether each concept gets a pruned subnetwork of its own; otherwise one dense backbone serves all.
        has_bottleneck: whether the label follows from concepts alone; otherwise a classifier predicts it.
        predictor_inputs: concepts that the label predictor is fitted on after the epochs; None where they train it.
    """

    loss: LossFn
    trains: tuple[Literal["concept", "task"], ...]
    title: str
    is_sparse: bool = False
    has_bottleneck: bool = True
    predictor_inputs: Literal["gold", "predicted"] | None = None


# The names are those of `config.run_config.STRATEGIES`.
STRATEGIES = {
    "standard": Strategy(task_loss, ("task",), "dense model of the task alone", has_bottleneck=False),
    "independent": Strategy(concept_loss, ("concept",), "dense model of the concepts alone", predictor_inputs="gold"),
    "sequential": Strategy(
        concept_loss, ("concept",), "dense model of the concepts alone", predictor_inputs="predicted"
    ),
    "joint": Strategy(joint_loss, ("concept", "task"), "dense joint model"),
    "sparse": Strategy(joint_loss, ("concept", "task"), "SparseCBM", is_sparse=True),
}
# Of these the backbone is trained for concepts and label at once.
JOINTLY_TRAINED = tuple(name for name, strategy in STRATEGIES.items() if len(strategy.trains) == 2)
