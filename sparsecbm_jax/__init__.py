"""SparseCBM in JAX: one language model, a sparse subnetwork for each concept, decisions that can be read and corrected.

A name below is imported when it is first asked for, so that `import sparsecbm_jax` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsecbm_jax.artifact import Predictions, SparseCBM, load, predict, save
    from sparsecbm_jax.config import RunConfig, from_config_dict
    from sparsecbm_jax.data.sources import load_dataset
    from sparsecbm_jax.edit_log import EditLog
    from sparsecbm_jax.edits import MaskEdit, StoredEdit
    from sparsecbm_jax.evaluation import evaluate
    from sparsecbm_jax.explanation import DecisionPathway, explain, explain_stream
    from sparsecbm_jax.intervention import intervene
    from sparsecbm_jax.training import train

__version__ = "0.1.0"

__all__ = [
    "DecisionPathway",
    "EditLog",
    "MaskEdit",
    "Predictions",
    "RunConfig",
    "SparseCBM",
    "StoredEdit",
    "evaluate",
    "explain",
    "explain_stream",
    "from_config_dict",
    "intervene",
    "load",
    "load_dataset",
    "predict",
    "save",
    "train",
]

_ROOMS = {
    "artifact": ("Predictions", "SparseCBM", "load", "predict", "save"),
    "config": ("RunConfig", "from_config_dict"),
    "data.sources": ("load_dataset",),
    "edit_log": ("EditLog",),
    "edits": ("MaskEdit", "StoredEdit"),
    "evaluation": ("evaluate",),
    "explanation": ("DecisionPathway", "explain", "explain_stream"),
    "intervention": ("intervene",),
    "training": ("train",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
