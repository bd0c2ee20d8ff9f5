"""Training strategies of the paper's Appendix A: what each trains, with which loss, and what of it is scored."""

from sparsecbm_jax.model.losses import LossFn, concept_loss, joint_loss, task_loss

LOSSES: dict[str, LossFn] = {
    "standard": task_loss,
    "independent": concept_loss,
    "sequential": concept_loss,
    "joint": joint_loss,
    "sparse": joint_loss,
}


# What a strategy has trained by the time its epochs are scored; the others have both.
SCORED_PARTS = {"standard": ("task",), "independent": ("concept",), "sequential": ("concept",)}
