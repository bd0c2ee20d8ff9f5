"""A few reviews of the embedded set, in files: a run over them takes seconds, in a process of its own too."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from sparsecbm_jax.data.presets import PRESETS
from sparsecbm_jax.data.synthetic.reviews import sample_reviews

_FOLDER = tempfile.TemporaryDirectory(prefix="sparsecbm-sample-", ignore_cleanup_errors=True)


@functools.cache
def _written(num_train: int, num_others: int) -> str:
    folder = Path(_FOLDER.name) / f"{num_train}-{num_others}"
    folder.mkdir()
    for split, rows in sample_reviews().items():
        file = folder / PRESETS["cebab"].files[split]
        file.write_text(json.dumps(rows[: num_train if split == "train" else num_others]), encoding="utf-8")
    return str(folder)


def small_data(num_train: int = 96, num_others: int = 48) -> dict[str, Any]:
    """`config.data` of that many reviews for training, and of that many each for validation and test.

    With two of the concepts and texts of one length: programs are compiled for every concept and length.
    """
    return {
        "preset": "cebab",
        "path": _written(num_train, num_others),
        "concepts": ("food", "service"),
        "concept_columns": ("food_aspect_majority", "service_aspect_majority"),
        "max_length": 16,
    }


# A whole run over them.
SMALL_RUN: dict[str, Any] = {
    "backbone": {"name": "tiny"},
    "data": small_data(),
    "optim": {"learning_rate": 1e-3},
    "training": {"num_epochs": 3, "batch_size": 16, "eval_batch_size": 16},
    "sparsity": {"start_epoch": 0, "end_epoch": 1},
    "pruner": {"criterion": "magnitude", "num_grads": 2},
}


def as_flag(key: str, value: Any) -> str:
    """A setting on the command line."""
    return f"--config.{key}={','.join(value) if isinstance(value, tuple) else value}"
