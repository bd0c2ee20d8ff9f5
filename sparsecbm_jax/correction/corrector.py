"""Corrections that stay in force: the file that their texts stand in, and what each new one takes.

An edit log has no texts, and a lasting edit answers for all of them (`lasting`): so they are kept beside it, a JSON
object with text, concept and target a line.
"""

from collections.abc import Callable, Iterable, Sequence

from sparsecbm_jax.config.names import name_index
from sparsecbm_jax.core.masks import check_masks
from sparsecbm_jax.correction.corrections import correct_lastingly, remember
from sparsecbm_jax.correction.report import CorrectionReport
from sparsecbm_jax.correction.request_file import CorrectionRequest
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.intervention.edit_costs import fisher_costs, sharpen
from sparsecbm_jax.intervention.ranking import EditCosts
from sparsecbm_jax.intervention.replay import Replay
from sparsecbm_jax.model.sparse_cbm import SparseCBM


class ContinualCorrector:
    """Makes one lasting correction after another, each with those before it in view; see `correct_lastingly`.

    What weights cost, and how anchors are read, is found out when a concept is first corrected. The same questions, in
    any order, get the same edits.

    Args:
        original: the model before any correction.
        anchors: training texts with their gold concepts, which are to be read as they are.
        on_gradient: called for each of the anchors' batches, once for each concept that is corrected.

    Raises:
        ValueError: if the model has no masks, or there are no anchors.
    """

    def __init__(
        self, original: SparseCBM, anchors: Sequence[Batch], *, on_gradient: Callable[[], object] = lambda: None
    ) -> None:
        check_masks(original.masks)
        self._original, self._anchors, self._on_gradient = original, list(anchors), on_gradient
        self._replay = Replay(self._anchors)
        self._guards: dict[int, EditCosts] = {}

    def correct(
        self, model: SparseCBM, case: CorrectionRequest, earlier: Iterable[CorrectionRequest]
    ) -> tuple[SparseCBM, CorrectionReport]:
        """Makes a correction.

        Args:
            model: the original with the edits so far.
            case: what is asked for.
            earlier: corrections to be kept in force.

        Raises:
            ValueError: as `correct_lastingly`.
        """
        replay = self._replay.emptied()
        for one in earlier:
            remember(model, *one, replay)
        guard = self._guard(name_index("concept", case.concept, model.schema.concepts))
        return correct_lastingly(model, *case, replay, original=self._original, guard=guard)

    def _guard(self, concept: int) -> EditCosts:
        if concept not in self._guards:
            model = self._original
            assert model.masks is not None
            arrays = (model.config, model.params, model.masks, model.heads)
            self._guards[concept] = sharpen(
                fisher_costs(*arrays, self._anchors, concept, on_gradient=self._on_gradient)
            )
        return self._guards[concept]
