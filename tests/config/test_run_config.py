"""A setting that does not exist, or that cannot be meant, is named before anything runs."""

from __future__ import annotations

import dataclasses
import doctest
import json
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict, config_dict

from sparsecbm_jax.config import run_config as config_module
from sparsecbm_jax.config.names import nearest_name
from sparsecbm_jax.config.run_config import RunConfig, __file__, from_config_dict, key_names, to_dict

pytestmark = pytest.mark.strict_rank

NESTED = {
    "seed": 3,
    "strategy": "joint",
    "data": {"concepts": ["food", "noise"], "path": "reviews.csv"},
    "sparsity": {"final": 0.7},
    "gamma": 1,
}


def test_defaults_are_those_of_the_method() -> None:
    config = RunConfig()
    assert (config.strategy, config.gamma) == ("sparse", 5.0)
    assert (config.training.num_epochs, config.training.batch_size) == (20, 8)
    assert (config.pruner.num_grads, config.pruner.block_size, config.sparsity.scope) == (128, 64, "global")
    assert config.data.missing_as_unknown and config.sparsity.final is None


def test_doctests() -> None:
    results = doctest.testmod(config_module)
    assert results.attempted > 0 and results.failed == 0


def test_config_dict_and_json_give_back_an_equal_config() -> None:
    config = from_config_dict(NESTED)
    assert from_config_dict(to_dict(config)) == config
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert from_config_dict(ConfigDict(NESTED)) == config
    assert hash(config) == hash(from_config_dict(NESTED))


def test_values_take_their_declared_types() -> None:
    config = from_config_dict(NESTED)
    assert config.data.concepts == ("food", "noise")
    assert isinstance(config.gamma, float)
    unset = ConfigDict({"data": {"path": config_dict.placeholder(str)}})
    assert from_config_dict(unset).data.path is None


def test_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"traning": {"batch_size": 4}}, "unknown key config.traning; did you mean config.training?"),
        (
            {"training": {"bach_size": 4}},
            "unknown key config.training.bach_size; did you mean config.training.batch_size?",
        ),
        ({"learning_rate": 1e-4}, "unknown key config.learning_rate; did you mean config.optim.learning_rate?"),
        ({"qqq": 1}, "unknown key config.qqq; valid are config.seed,"),
        ({"strategy": "joit"}, "config.strategy is 'joit'; expected one of 'standard'"),
        ({"strategy": "joit"}, "did you mean 'joint'?"),
        ({"sparsity": {"schedule": "cubik"}}, "config.sparsity.schedule is 'cubik'"),
        ({"sparsity": {"final": 1.0}}, r"config.sparsity.final is 1.0; expected a fraction in \[0, 1\)"),
        ({"sparsity": {"initial": -0.1}}, "config.sparsity.initial is -0.1"),
        ({"sparsity": {"initial": 0.5, "final": 0.4}}, "config.sparsity.final is 0.4, but must be at least"),
        (
            {"sparsity": {"scope": "per_row", "shared_fraction": 0.5}},
            "shared_fraction does not go with scope='per_row'",
        ),
        ({"sparsity": {"regrow": True, "reestimations": 2}}, "reestimations > 1 does not go with regrow"),
        ({"sparsity": {"start_epoch": 6, "end_epoch": 6}}, "config.sparsity.end_epoch is 6, but must be above"),
        (
            {"training": {"num_epochs": 12}},
            "config.sparsity.end_epoch is 12, .*expects at most 11.*start_epoch=4 and end_epoch=8 would do",
        ),
        ({"training": {"num_epochs": 0}}, "config.training.num_epochs is 0; expected an integer of at least 1"),
        ({"training": {"batch_size": 8.0}}, "config.training.batch_size is 8.0, a float; expected an integer"),
        ({"training": {"batch_size": True}}, "config.training.batch_size is True, a bool"),
        ({"training": {"patience": "2"}}, "config.training.patience is '2', a str; expected an integer or None"),
        ({"training": 20}, "config.training is 20; expected a section"),
        ({"optim": {"learning_rate": float("nan")}}, "config.optim.learning_rate is nan"),
        ({"optim": {"learning_rate": "3e-5"}}, "config.optim.learning_rate is '3e-5', a str; expected a number"),
        ({"data": {"concepts": "food"}}, "config.data.concepts is 'food', a str; expected a list of strings"),
        (
            {"data": {"concepts": ["food"], "concept_columns": ["a", "b"]}},
            r"config.data.concepts has 1 .* config.data.concept_columns has 2",
        ),
        ({"data": {"missing_as_unknown": 1}}, "config.data.missing_as_unknown is 1, a int; expected True or False"),
        ({"data": {"path": 5}}, "config.data.path is 5, a int; expected a string or None"),
        ({"backbone": {"dtype": "float64"}}, "config.backbone.dtype is 'float64'"),
        ({"mesh": {"fsdp": 0}}, "config.mesh.fsdp is 0"),
    ],
)
def test_what_cannot_be_meant_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_config_dict(given)


def test_dense_strategies_do_not_need_room_for_pruning() -> None:
    assert from_config_dict({"strategy": "joint", "training": {"num_epochs": 1}}).training.num_epochs == 1


def test_every_setting_says_what_it_means() -> None:
    source = Path(str(__file__)).read_text()
    for key in key_names():
        name = key.rpartition(".")[2]
        if dataclasses.is_dataclass(getattr(RunConfig(), name, None)):
            continue
        line = next(i for i, text in enumerate(source.splitlines()) if text.startswith(f"    {name}: "))
        assert source.splitlines()[line + 1].lstrip().startswith('"""'), f"{key} has no docstring"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("data.pth", "data.path"), ("sparsity.num_grads", "pruner.num_grads"), ("sede", "seed"), ("xyzzyxyzzy", None)],
)
def test_nearest_name(name: str, expected: str | None) -> None:
    assert nearest_name(name, key_names()) == expected
