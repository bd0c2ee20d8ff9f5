"""SparseCBM in JAX: one language model, a sparse subnetwork for each concept, decisions that can be read and corrected.

A name below is imported when it is first asked for, so that `import sparsecbm_jax` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparsecbm_jax.config import moved_names
from sparsecbm_jax.version import __version__

if TYPE_CHECKING:
    from sparsecbm_jax.config.run_config import RunConfig, from_config_dict
    from sparsecbm_jax.correction.corrections import correct
    from sparsecbm_jax.data.sources import load_dataset
    from sparsecbm_jax.evaluation.scores import evaluate
    from sparsecbm_jax.explanation.pathways import DecisionPathway, explain, explain_stream
    from sparsecbm_jax.intervention import editors
    from sparsecbm_jax.intervention.edit_log import EditLog
    from sparsecbm_jax.intervention.fixed_size_edit import intervene
    from sparsecbm_jax.intervention.mask_edit import MaskEdit
    from sparsecbm_jax.intervention.stored_edit import StoredEdit
    from sparsecbm_jax.model.predictions import Predictions, predict
    from sparsecbm_jax.model.saved_model import load, save
    from sparsecbm_jax.model.sparse_cbm import ModelArrays, SparseCBM
    from sparsecbm_jax.training.run import train

_MODULES = {
    "config.run_config": ("RunConfig", "from_config_dict"),
    "correction.corrections": ("correct",),
    "data.sources": ("load_dataset",),
    "evaluation.scores": ("evaluate",),
    "explanation.pathways": ("DecisionPathway", "explain", "explain_stream"),
    "intervention.edit_log": ("EditLog",),
    "intervention.fixed_size_edit": ("intervene",),
    "intervention.mask_edit": ("MaskEdit",),
    "intervention.stored_edit": ("StoredEdit",),
    "model.predictions": ("Predictions", "predict"),
    "model.saved_model": ("load", "save"),
    "model.sparse_cbm": ("ModelArrays", "SparseCBM"),
    "training.run": ("train",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "DecisionPathway",
    "EditLog",
    "MaskEdit",
    "ModelArrays",
    "Predictions",
    "RunConfig",
    "SparseCBM",
    "StoredEdit",
    "__version__",
    "correct",
    "editors",
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

moved_names.explain_missing_modules()


def __getattr__(name: str) -> Any:
    if name == "editors":
        return importlib.import_module(f"{__name__}.intervention.editors")
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{moved_names.hint(name)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
