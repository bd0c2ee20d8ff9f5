"""The table of training strategies against the paper's Appendix A, and against the names that a config takes."""

import pytest

from sparsecbm_jax.config import run_config
from sparsecbm_jax.model.losses import concept_loss, joint_loss, task_loss
from sparsecbm_jax.model.strategies import JOINTLY_TRAINED, STRATEGIES


def test_a_config_takes_the_strategies_of_the_table() -> None:
    assert tuple(STRATEGIES) == run_config.STRATEGIES


@pytest.mark.parametrize("name", run_config.STRATEGIES)
def test_what_is_trained_and_scored_is_what_the_loss_sees(name: str) -> None:
    strategy = STRATEGIES[name]
    sees = {task_loss: ("task",), concept_loss: ("concept",), joint_loss: ("concept", "task")}
    assert strategy.trains == sees[strategy.loss]
    # The label has to be learned from concepts where the epochs do not train it.
    assert (strategy.predictor_inputs is None) == ("task" in strategy.trains)


def test_one_strategy_is_sparse_and_one_has_no_concepts() -> None:
    assert [name for name, strategy in STRATEGIES.items() if strategy.is_sparse] == ["sparse"]
    assert [name for name, strategy in STRATEGIES.items() if not strategy.has_bottleneck] == ["standard"]
    assert JOINTLY_TRAINED == ("joint", "sparse")
    assert (STRATEGIES["independent"].predictor_inputs, STRATEGIES["sequential"].predictor_inputs) == (
        "gold",
        "predicted",
    )
