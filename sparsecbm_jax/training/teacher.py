"""The dense model that a sparse run had before its first pruning event, as what it says of every training text.

It is run once over the training split; so a step of training costs what it costs without a teacher.
"""

from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int

from sparsecbm_jax.config.run_config import RunConfig
from sparsecbm_jax.data.batches import Batch, TeacherLogits
from sparsecbm_jax.model.losses import Distilled, LossFn
from sparsecbm_jax.model.strategies import STRATEGIES
from sparsecbm_jax.training.label_predictor import outputs_of
from sparsecbm_jax.training.setup import RunContext
from sparsecbm_jax.training.train_step import TrainState

TEACHER_FILE = "teacher.npz"


class Teacher:
    """The logits of the dense model for all rows of the training split.

    Args:
        row_ids: of the rows.
        logits: row by row.
    """

    def __init__(self, row_ids: Int[np.ndarray, " N"], logits: TeacherLogits) -> None:
        self._row_ids, self._logits = row_ids, logits
        order = np.argsort(row_ids, kind="stable")
        self._order, self._sorted = order, row_ids[order]

    @classmethod
    def of_state(cls, context: RunContext, state: TrainState) -> "Teacher":
        """Runs a state of a run over its training split."""
        outputs = outputs_of(context, state, "train")
        row_ids = np.sort(context.prepared.splits["train"].row_ids)
        return cls(row_ids, TeacherLogits(outputs.concept_logits, outputs.label_logits))

    @classmethod
    def load(cls, workdir: Path) -> "Teacher":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: if there is nothing.
        """
        path = workdir / TEACHER_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, in which a distilled run keeps what its dense model said")
        with np.load(path) as saved:
            return cls(saved["row_ids"], TeacherLogits(saved["concepts"], saved["label"]))

    def save(self, workdir: Path) -> None:
        """Writes `teacher.npz`, by process 0, whole or not at all."""
        if jax.process_index() == 0:
            beside = workdir / f".{TEACHER_FILE}"
            with beside.open("wb") as file:
                np.savez(file, row_ids=self._row_ids, **self._logits._asdict())
            beside.replace(workdir / TEACHER_FILE)

    def teach(self, batch: Batch) -> Batch:
        """Returns a batch with the teacher's logits; rows that only fill it up have those of some row."""
        found = np.searchsorted(self._sorted, np.maximum(batch.row_ids, self._sorted[0]))
        rows = self._order[found]
        return batch._replace(teacher=TeacherLogits(*(leaf[rows] for leaf in self._logits)))


def loss_of(run: RunConfig, own: LossFn | None = None) -> LossFn:
    """Returns the loss that a run minimises.

    Args:
        run: the run.
        own: a loss of the caller's in place of the strategy's.
    """
    loss_fn = STRATEGIES[run.strategy].loss if own is None else own
    return Distilled(loss_fn, run.distillation.weight, run.distillation.temperature) if is_distilled(run) else loss_fn


def is_distilled(run: RunConfig) -> bool:
    """Says whether a run learns from a teacher after its first pruning event."""
    return STRATEGIES[run.strategy].is_sparse and run.distillation.weight > 0
