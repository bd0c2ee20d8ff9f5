"""A few reviews of the embedded set, in files: a run over them takes seconds, in a process of its own too."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from sparsecbm_jax.data.presets import PRESETS
from sparsecbm_jax.data.sample import sample_reviews

_FOLDER = tempfile.TemporaryDirectory(prefix="sparsecbm-sample-", ignore_cleanup_errors=True)


@functools.cache
def _written(num_train: int, num_others: int) -> str:
    folder = Path(_FOLDER.name) / f"{num_train}-{num_others}"
    folder.mkdir()
    for split, rows in sample_reviews().items():
        file = folder / PRESETS["cebab"].files[split]
        file.write_text(json.dumps(rows[: num_train if split == "train" else num_others]), encoding="utf-8")
    return str(folder)


def small_data(max_length: int = 16, num_train: int = 96, num_others: int = 48) -> dict[str, Any]:
    """`config.data` of that many reviews for training, and of that many each for validation and test."""
    return {"preset": "cebab", "path": _written(num_train, num_others), "max_length": max_length}
