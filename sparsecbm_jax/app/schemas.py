"""Requests and answers of the live page's API: dataclasses, which define checks, JSON and the OpenAPI document."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from sparsecbm_jax.config.names import did_you_mean
from sparsecbm_jax.correction.report import CorrectionReport, EditorDescription, TextPrediction
from sparsecbm_jax.explanation.pathways import DecisionPathway
from sparsecbm_jax.intervention.stored_edit import StoredEdit

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


class ApiError(ValueError):
    """An error that is answered in place of a result.

    Attributes:
        status: HTTP status code.
        field: Field of the form that was wrong; None where no single field was.
        headers: Headers of the answer.
    """

    def __init__(
        self, status: int, message: str, *, field: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.field, self.headers = status, field, dict(headers or {})


@dataclasses.dataclass(frozen=True)
class Text:
    """A text to explain.

    Attributes:
        text: The text, not empty, and at most as long as the server allows.
    """

    text: str


@dataclasses.dataclass(frozen=True)
class Question:
    """A correction to preview.

    Attributes:
        text: The text that is predicted incorrectly.
        concept: The concept that is predicted incorrectly.
        target: The class that the concept should have.
    """

    text: str
    concept: str
    target: str


@dataclasses.dataclass(frozen=True)
class Order:
    """A correction to make.

    Attributes:
        text, concept, target: As in a preview.
        edit: Id of the edit that the preview showed; no edit is made if the model has changed since and another edit
            would be needed. Null or absent makes any edit that repairs the concept now.
    """

    text: str
    concept: str
    target: str
    edit: str | None = None


@dataclasses.dataclass(frozen=True)
class EditId:
    """An active edit.

    Attributes:
        edit: Its id.
    """

    edit: str


@dataclasses.dataclass(frozen=True)
class Correction:
    """A correction in numbers.

    Attributes:
        text, concept, target, label: The request; label is null, since the task label is not corrected.
        editor: The editor that changed the model.
        num_dropped, num_grown: Numbers of changed weights.
        num_weights: Maskable weights of the backbone.
        is_repaired: True where the concept has the requested class with the edit.
        changed_share: Dropped and grown weights over `num_weights`.
        before, after: Predictions for the text.
    """

    text: str
    concept: str
    target: str
    label: str | None
    editor: EditorDescription
    num_dropped: int
    num_grown: int
    num_weights: int
    is_repaired: bool
    changed_share: float
    before: TextPrediction
    after: TextPrediction

    @classmethod
    def of(cls, report: CorrectionReport) -> "Correction":
        """Makes a correction from a report, without the positions."""
        unconverted = {name: getattr(report, name) for name in ("editor", "before", "after")}
        return cls(**(report.to_dict() | unconverted))


@dataclasses.dataclass(frozen=True)
class SampleEffect:
    """The effect of an edit on held-out texts. Other concepts are predicted as before: their subnetworks stay.

    Attributes:
        num_texts: Texts in the sample.
        num_changed: Texts whose concept is predicted as another class.
        num_repaired, num_broken: Texts with a gold class that are predicted correctly only after, and only before.
        num_labels_changed: Texts that get another label.
        shift: Mean total variation distance of the concept's probabilities before and after, from 0 to 1.
        flips: Number of texts that are predicted as another class, by class before and class after.
        changed_texts: The first of those texts.
    """

    num_texts: int
    num_changed: int
    num_repaired: int
    num_broken: int
    num_labels_changed: int
    shift: float
    flips: dict[str, dict[str, int]]
    changed_texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Preview:
    """The effect of a correction that is not made yet.

    Attributes:
        edit: Id of the edit, to apply this one and no other; null where nothing would change.
        report: The correction in numbers.
        before, after: The text's pathway now, and with the edit, for the requested class.
        sample: The effect on held-out texts; null where the server has none, or nothing would change.
    """

    edit: str | None
    report: Correction
    before: DecisionPathway
    after: DecisionPathway
    sample: SampleEffect | None


@dataclasses.dataclass(frozen=True)
class EditSummary:
    """An active edit.

    Attributes:
        id: Twelve hexadecimal digits.
        concept, was, target: The corrected concept, its class before, and the requested class.
        num_dropped, num_grown: Numbers of changed weights.
        text_sha256: SHA-256 of the corrected text; the text itself is not stored.
    """

    id: str
    concept: str
    was: str
    target: str
    num_dropped: int
    num_grown: int
    text_sha256: str

    @classmethod
    def of(cls, edit: StoredEdit) -> "EditSummary":
        """Makes the entry of an edit for a list."""
        was = edit.before.get("concepts", {}).get(edit.concept, "?")
        return cls(edit.id, edit.concept, was, edit.target, *edit.num_changed, edit.text_sha256)


@dataclasses.dataclass(frozen=True)
class Edits:
    """All active edits.

    Attributes:
        edits: The edits, oldest first.
    """

    edits: tuple[EditSummary, ...]


@dataclasses.dataclass(frozen=True)
class Applied:
    """The result of an order.

    Attributes:
        edit: Id of the edit that is active now; null where no change was needed, or no edit was found.
        is_repaired: True where the concept of the text has the requested class now.
        edits: All active edits, oldest first.
    """

    edit: str | None
    is_repaired: bool
    edits: tuple[EditSummary, ...]


@dataclasses.dataclass(frozen=True)
class Health:
    """The state of the server.

    Attributes:
        status: Always 'ok', since the server answers.
        num_waiting: Requests for the model that are running or waiting.
        num_edits: Number of active edits.
    """

    status: str
    num_waiting: int
    num_edits: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """The reason why there is no result.

    Attributes:
        message: Message for a person.
        field: Field of the request that was wrong; null where no single field was.
    """

    message: str
    field: str | None


def read_request(form: type[T], body: bytes) -> T:
    """Reads a request's JSON into a dataclass.

    Args:
        form: The dataclass.
        body: JSON in UTF-8.

    Raises:
        ApiError: 400, if the JSON is not of this form; the field is named.
    """
    hints = typing.get_type_hints(form)
    expected = f"a JSON object with {', '.join(map(repr, hints))}"
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request is not JSON ({error}); expected {expected}") from None
    if not isinstance(content, dict):
        raise ApiError(400, f"the request is {_kind(content)}; expected {expected}")
    for name in content:
        if name not in hints:
            raise ApiError(
                400, f"there is no field {name!r}{did_you_mean(name, hints)}; expected {expected}", field=name
            )
    for field in dataclasses.fields(form):
        if field.name not in content:
            if field.default is dataclasses.MISSING:
                raise ApiError(400, f"{field.name!r} is missing; expected {expected}", field=field.name)
        elif not isinstance(content[field.name], hints[field.name]):
            kinds = " or ".join(_NAMES[one] for one in _alternatives(hints[field.name]))
            message = f"{field.name!r} is {_kind(content[field.name])}; expected {kinds}"
            raise ApiError(400, message, field=field.name)
    return form(**content)


_NAMES = {
    str: "a string",
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    list: "an array",
    dict: "an object",
}


def _kind(value: Any) -> str:
    return _NAMES[type(value)]


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
