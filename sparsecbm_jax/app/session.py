"""The model that the live page shows and corrects, and the log of its corrections; independent of HTTP."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsecbm_jax.app.schemas import (
    ApiError,
    Applied,
    Correction,
    Edits,
    EditSummary,
    Order,
    Preview,
    Question,
    SampleEffect,
)
from sparsecbm_jax.config.names import check_name
from sparsecbm_jax.core.masks import check_masks
from sparsecbm_jax.correction.corrections import correct
from sparsecbm_jax.correction.preview import outputs_of, preview
from sparsecbm_jax.correction.report import CorrectionReport
from sparsecbm_jax.correction.request_file import CorrectionRequest, RequestFile
from sparsecbm_jax.data.batches import Batch, eval_batches, tokenize
from sparsecbm_jax.data.schema import Examples
from sparsecbm_jax.explanation.pathways import DecisionPathway, explain
from sparsecbm_jax.intervention import editors
from sparsecbm_jax.intervention.edit_log import EditLog
from sparsecbm_jax.intervention.editors import Editor
from sparsecbm_jax.intervention.stored_edit import (
    Positions,
    StoredEdit,
    apply_stored,
    overlapping,
    text_hash,
    undo_stored,
)
from sparsecbm_jax.model.config import CBMOutput
from sparsecbm_jax.model.predictions import text_batches
from sparsecbm_jax.model.sparse_cbm import SparseCBM

# Widths, in tokens, to which single texts are padded.
WIDTHS = (64, 128, 256, 512)
SAMPLE_BATCH = 32
MAX_CHANGED_TEXTS = 5
MAX_REMEMBERED = 64


class Found(NamedTuple):
    """The edit for a question, None where nothing would change; and whether the concept is repaired with it."""

    edit: StoredEdit | None
    is_repaired: bool


class SessionState(NamedTuple):
    """The model with all active edits applied, and these edits."""

    model: SparseCBM
    edits: tuple[StoredEdit, ...]


class Session:
    """A model that is corrected, one request after another.

    Every method runs in the caller's thread, and only one may run at a time. Only `edits`, `num_edits` and `get` may be
    called from another thread meanwhile: they read a state that is replaced as a whole.
    """

    def __init__(
        self,
        model: SparseCBM,
        log: str | Path,
        sample: Examples | None = None,
        *,
        editor: Editor | None = None,
        requests: RequestFile | None = None,
    ) -> None:
        """Opens the log, or creates it, and applies its active edits.

        Args:
            model: A model with masks, and without any of the log's edits.
            log: File of edits; see `EditLog`.
            sample: Held-out texts on which previews measure effects; None or no texts for none.
            editor: The editor of corrections; None for the minimal edit.
            requests: File for the texts of corrections, from which the editor receives the earlier ones; None for an
                editor that uses one text only.

        Raises:
            ValueError: The model has no masks, or the log is damaged or belongs to another model.
        """
        check_masks(model.masks)
        masks = model.masks
        assert masks is not None
        # Many widths would cost more to compile than single texts can win back.
        model = dataclasses.replace(model.for_few_texts(), metadata={**model.metadata, "buckets": WIDTHS})
        self._log = EditLog(log, masks, model.schema.concepts)
        self._state = SessionState(dataclasses.replace(model, masks=self._log.replay(masks)), self._log.edits)
        self._editor = editors.minimal() if editor is None else editor
        self._requests = requests
        self._sample: list[Batch] = []
        self._sample_texts: dict[int, str] = {}
        if sample is not None and sample.texts:
            tokens = tokenize(sample, model.tokenizer, model.max_length)
            self._sample = list(eval_batches(tokens, batch_size=SAMPLE_BATCH, buckets=WIDTHS))
            self._sample_texts = dict(zip(sample.row_ids.tolist(), sample.texts, strict=True))
        # The outputs on the sample and the edits active then; and the edits of recent questions.
        self._outputs: tuple[tuple[StoredEdit, ...] | None, list[tuple[Batch, CBMOutput]]] = (None, [])
        self._found: dict[tuple[tuple[str, ...], Question], Found] = {}

    def close(self) -> None:
        """Closes the log, so that another process can write it."""
        self._log.close()

    @property
    def model(self) -> SparseCBM:
        """The model as it is now."""
        return self._state.model

    @property
    def edits(self) -> tuple[EditSummary, ...]:
        """The active edits, oldest first."""
        return tuple(map(EditSummary.of, self._state.edits))

    @property
    def num_edits(self) -> int:
        """Number of active edits."""
        return len(self._state.edits)

    @property
    def keeps_earlier(self) -> bool:
        """True where each correction is made together with the earlier ones."""
        return self._requests is not None

    @property
    def num_kept(self) -> int:
        """Number of active edits that later corrections are made together with: those whose texts are in the file."""
        return 0 if self._requests is None else len(self._requests.of_edits(self._state.edits))

    def get(self, edit_id: str) -> StoredEdit:
        """Returns an active edit.

        Raises:
            ApiError: 404, if there is none of that id.
        """
        for edit in self._state.edits:
            if edit.id == edit_id:
                return edit
        raise ApiError(404, f"there is no active edit {edit_id!r}", field="edit")

    def explain(self, text: str) -> DecisionPathway:
        """Explains a text by its pathway.

        Raises:
            ApiError: 400, if the text has no tokens.
        """
        self._check_text(text)
        return explain(self.model, [text])[0]

    def preview(self, question: Question) -> Preview:
        """Computes the effect of a correction on its text and on held-out ones, without making it.

        Raises:
            ApiError: 400, if there is no such concept or class, or the text has no tokens.
        """
        found, corrected, report = self._correct(question)
        target = {question.concept: question.target}
        before, after = (explain(one, [question.text], target)[0] for one in (self.model, corrected))
        return Preview(
            edit=found.edit.id if found.edit else None,
            report=Correction.of(report),
            before=before,
            after=after,
            sample=self._effect(corrected, question.concept) if found.edit and self._sample else None,
        )

    def apply(self, order: Order) -> Applied:
        """Makes a correction and returns once it is on disk.

        Raises:
            ApiError: As `preview`; 409, if the edit would be another than the one that was previewed; 503, if it cannot
                be written, in which case it is not made.
        """
        question = Question(order.text, order.concept, order.target)
        found = self._found.get(self._key(question)) or self._correct(question)[0]
        if order.edit is not None and (found.edit is None or found.edit.id != order.edit):
            raise ApiError(409, "the model has changed since this was previewed; preview it again", field="edit")
        if found.edit is not None:
            concepts = self.model.schema.concepts
            masks = apply_stored(self._masks(), found.edit, concepts)
            with _writing():
                if self._requests is not None:
                    # Before the edit, so that every active edit has its text.
                    self._requests.add(CorrectionRequest(order.text, order.concept, order.target))
                self._log.append(found.edit)
            self._state = SessionState(dataclasses.replace(self.model, masks=masks), self._log.edits)
        return Applied(found.edit.id if found.edit else None, found.is_repaired, self.edits)

    def undo(self, edit_id: str) -> Edits:
        """Undoes an edit at any place of the log, and returns once that is on disk.

        Raises:
            ApiError: 404, if it is not active; 409, if later edits changed the same weights; 503, as `apply`.
        """
        edit = self.get(edit_id)
        later = self._state.edits[self._state.edits.index(edit) + 1 :]
        if met := overlapping(edit, later):
            first = "undo those first" if len(met) > 1 else "undo that one first"
            raise ApiError(
                409, f"edit {edit_id} shares weights with {', '.join(met)}, made later; {first}", field="edit"
            )
        with _writing():
            masks = self._log.undo(self._masks(), edit_id)
        self._state = SessionState(dataclasses.replace(self.model, masks=masks), self._log.edits)
        return Edits(self.edits)

    @property
    def num_lengths(self) -> int:
        """Number of widths to which texts are padded; programs are compiled for each."""
        return len(self._lengths())

    def warm_up(self) -> Iterator[int]:
        """Compiles the programs of requests, one width of texts after another; yields each width; changes nothing."""
        schema = self.model.schema
        self._flip_and_back()
        if self._sample:
            self._effect(self.model, schema.concepts[0])
        for length in self._lengths():
            text = " ".join(["a"] * (length - self.model.tokenizer.num_special_tokens_to_add()))
            lane = self.explain(text).concepts[0]
            target = next(name for name in schema.classes if name != lane.predicted_class)
            # Edits for several texts are as wide as their widest text: programs for wide ones are compiled when needed.
            if self._requests is None or length == self._lengths()[0]:
                self._correct(Question(text, schema.concepts[0], target))
            yield length

    def _flip_and_back(self) -> None:
        """Applies and undoes an edit of every kernel on a copy, to compile the programs that flip few weights."""
        masks, concepts = self._masks(), self.model.schema.concepts
        positions = {}
        for path, mask in masks.items():
            kept = np.asarray(mask[0])
            positions[path] = Positions(kept.shape, np.flatnonzero(kept)[:1], np.flatnonzero(~kept)[:1])
        edit = StoredEdit(concepts[0], self.model.schema.classes[0], None, text_hash(""), "signed", 1, positions)
        undo_stored(apply_stored(masks, edit, concepts), edit, concepts)

    def _lengths(self) -> list[int]:
        longest = self.model.max_length
        return [length for length in self.model.buckets if length < longest] + [longest]

    def _masks(self) -> dict:
        masks = self.model.masks
        assert masks is not None
        return dict(masks)

    def _key(self, question: Question) -> tuple[tuple[str, ...], Question]:
        """Returns all that an edit depends on: the question, and the active edits, which determine the masks."""
        return tuple(edit.id for edit in self._state.edits), question

    def _correct(self, question: Question) -> tuple[Found, SparseCBM, CorrectionReport]:
        schema = self.model.schema
        for kind, field, name, names in (
            ("concept", "concept", question.concept, schema.concepts),
            ("class", "target", question.target, schema.classes),
        ):
            try:
                check_name(kind, name, names)
            except ValueError as error:
                raise ApiError(400, str(error), field=field) from None
        self._check_text(question.text)
        request = CorrectionRequest(question.text, question.concept, question.target)
        earlier = [] if self._requests is None else self._requests.of_edits(self._state.edits)
        corrected, report = correct(self.model, request, editor=self._editor, earlier=earlier)
        found = Found(report.stored() if report.num_dropped or report.num_grown else None, report.is_repaired)
        while len(self._found) >= MAX_REMEMBERED:
            self._found.pop(next(iter(self._found)))
        self._found[self._key(question)] = found
        return found, corrected, report

    def _check_text(self, text: str) -> None:
        try:
            next(text_batches(self.model, [text], batch_size=1))
        except ValueError as error:
            raise ApiError(400, str(error).replace("texts[0]", "'text'", 1), field="text") from None

    def _effect(self, corrected: SparseCBM, concept: str) -> SampleEffect:
        model = self.model
        if self._outputs[0] is not self._state.edits:
            self._outputs = self._state.edits, outputs_of(model.config, model.arrays, self._sample)
        k, classes = model.schema.concepts.index(concept), model.schema.classes
        found = preview(model.config, corrected.arrays, self._outputs[1], k)
        return SampleEffect(
            num_texts=found.num_texts,
            num_changed=found.num_changed,
            num_repaired=found.num_repaired,
            num_broken=found.num_broken,
            num_labels_changed=found.num_labels_changed,
            shift=found.shift,
            flips={
                was: {now: int(found.flips[i, j]) for j, now in enumerate(classes) if i != j}
                for i, was in enumerate(classes)
            },
            changed_texts=tuple(self._sample_texts[row] for row in sorted(found.changed_rows)[:MAX_CHANGED_TEXTS]),
        )


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Turns errors in writing the log into error 503, which says that nothing was changed."""
    try:
        yield
    except OSError as error:
        raise ApiError(503, f"the log of edits cannot be written ({error}); nothing was changed") from error
