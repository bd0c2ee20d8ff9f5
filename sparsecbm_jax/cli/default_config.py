"""The defaults of every run as a config file, and the backbones of the paper's Table 2.

Each default is written down once, in `config/run_config.py`, with its meaning, unit and range.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict

from sparsecbm_jax.config.names import check_name
from sparsecbm_jax.config.run_config import RunConfig


class BackbonePreset(NamedTuple):
    """A backbone, and what a run with it changes."""

    name: str
    learning_rate: float
    batch_size: int = 8

    def settings(self) -> dict[str, Any]:
        """Returns what a run with it changes, by dotted name."""
        return {
            "backbone.name": self.name,
            "optim.learning_rate": self.learning_rate,
            "training.batch_size": self.batch_size,
        }


# The paper prints a grid of learning rates for each backbone (Table 3: 1e-3 / 1e-4 / 1e-5 / 1e-6; for OPT-350M and
# OPT-1.3B 1e-4 / 1e-5 / 1e-6 / 1e-7), not which one it chose. Those here are ours, from that grid. MiniLM and the
# tiny BERT are not in the paper.
BACKBONES = {
    "minilm": BackbonePreset("minilm", 5e-5),
    "tiny": BackbonePreset("tiny", 1e-3),
    "distilbert": BackbonePreset("distilbert-base-uncased", 1e-5),
    "bert": BackbonePreset("bert-base-uncased", 1e-5),
    "roberta": BackbonePreset("roberta-base", 1e-5),
    "opt_125m": BackbonePreset("facebook/opt-125m", 1e-5),
    "opt_350m": BackbonePreset("facebook/opt-350m", 1e-5),
    "opt_1_3b": BackbonePreset("facebook/opt-1.3b", 1e-6, batch_size=1),
    # Beyond the paper, for meshes (`configs/cebab_opt.py`).
    "opt_6_7b": BackbonePreset("facebook/opt-6.7b", 1e-6),
    "opt_13b": BackbonePreset("facebook/opt-13b", 1e-6),
    "opt_30b": BackbonePreset("facebook/opt-30b", 1e-6),
    "opt_66b": BackbonePreset("facebook/opt-66b", 1e-6),
}


def get_config(backbone: str = "minilm") -> ConfigDict:
    """Returns the defaults with one of `BACKBONES`.

    Raises:
        ValueError: There is no such backbone.
    """
    check_name("backbone preset", backbone, BACKBONES)
    config = _config_dict(RunConfig())
    config.update_from_flattened_dict(BACKBONES[backbone].settings())
    return config


def backbone_settings(name: str) -> dict[str, Any]:
    """Returns the settings of a run with a backbone, by dotted name.

    Args:
        name: one of `BACKBONES`, a hub name, or a folder of the hub's layout.
    """
    for preset, backbone in BACKBONES.items():
        if name in (preset, backbone.name):
            return backbone.settings()
    return {"backbone.name": name}


def _config_dict(defaults: Any) -> ConfigDict:
    """Returns the settings of a dataclass; those that may be None keep the type that a command line gives them."""
    hints = typing.get_type_hints(type(defaults))
    config = ConfigDict()
    for field in dataclasses.fields(defaults):
        value = getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            config[field.name] = _config_dict(value)
        elif isinstance(hints[field.name], types.UnionType):
            (kind,) = (arg for arg in typing.get_args(hints[field.name]) if arg is not types.NoneType)
            config[field.name] = config_dict.FieldReference(value, field_type=kind)
        else:
            config[field.name] = value
    return config.lock()
