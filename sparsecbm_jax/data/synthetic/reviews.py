"""The embedded set: SYNTHETIC restaurant reviews in CEBaB's schema, so that a first run needs no download.

No person wrote these reviews and no restaurant is meant. A grammar of our own (words in `lexicon.py`) draws them from a
seed: up to four aspects a review, praise and blame mixed, negation, contrast, turned expectations, aspects that are
only mentioned and aspects that are not. As in CEBaB, a group is one original and edits of it that each change a single
aspect. The reviews show that the code works; they measure nothing about real reviews.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from sparsecbm_jax.data.synthetic import lexicon
from sparsecbm_jax.data.synthetic.lexicon import (
    AGREEMENT,
    CONTRAST,
    EMPHATIC,
    FILLERS,
    NEGATED,
    NUMBERS,
    PLAIN,
    PLAIN_AGREEMENT,
    PLAIN_CONTRAST,
    PLAIN_VERY,
    STRAIGHT,
    TURNED,
    VERY,
)

T = TypeVar("T")

ASPECTS = tuple(lexicon.ASPECTS)
SIZES = {"train": 320, "validation": 120, "test": 160}
LARGE_SIZES = {"train": 1600, "validation": 600, "test": 600}
MIN_WORDS, MAX_WORDS = 5, 50
# Of the large set: the share of groups whose texts are short and plain, and the chances of one, two or three aspects.
PLAIN_SHARE = 0.5
PLAIN_ASPECTS = (0.4, 0.4, 0.2)
MIN_PLAIN_WORDS = 2
# Keys of the large set begin with it, so that it shares no draw with the small one.
_LARGE = 1_000_003
CLASSES = ("Negative", "Positive", "unknown")
NO_MAJORITY = "no majority"

NEGATIVE, POSITIVE, NEUTRAL, ABSENT = range(4)
# Chances of the four states above. Food is mentioned most and noise least, as in real reviews.
CHANCES: Mapping[str, Sequence[float]] = {
    "food": (0.38, 0.42, 0.06, 0.14),
    "ambiance": (0.29, 0.33, 0.08, 0.30),
    "service": (0.34, 0.36, 0.07, 0.23),
    "noise": (0.31, 0.25, 0.06, 0.38),
}
# Chances of a straight, a negated, a turned and an emphatic statement, and of a clause of the aspect's own.
FORMS = (0.34, 0.2, 0.1, 0.08, 0.28)
NUM_EDITS = (0.1, 0.4, 0.35, 0.15)
# The rating is 3 plus these weights for praise and minus them for blame, rounded; in a tenth of the rows, off by one.
WEIGHTS = {"food": 1.1, "service": 0.8, "ambiance": 0.5, "noise": 0.4}


class _Draw:
    """A random generator whose draws depend on its key alone; Philox's raw bits are the same in every NumPy."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.Philox(np.random.SeedSequence(key))

    def uniform(self) -> float:
        return (int(self._bits.random_raw()) >> 11) / 2.0**53

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.uniform() * len(items))]

    def weighted(self, chances: Sequence[float]) -> int:
        return min(int(np.searchsorted(np.cumsum(chances), self.uniform(), side="right")), len(chances) - 1)

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return [items[i] for i in np.argsort([self.uniform() for _ in items], kind="stable")]


# The index of an aspect, its state, and what is said of it.
_Clause = tuple[int, int, str]


class _Edit(NamedTuple):
    """The aspect that a sibling changes in its original."""

    aspect: str
    state: int


def sample_reviews(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """Returns SYNTHETIC reviews as rows of CEBaB's columns, 320 train, 120 validation and 160 test.

    All siblings of a group are in one split, and no text comes twice. Train has a few ratings and concept cells without
    a majority, as CEBaB has.

    Args:
        seed: Seed of the grammar, at least 0; the same seed gives the same reviews everywhere.
    """
    return _splits(SIZES, seed, plain_share=0.0)


def synthetic_reviews(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """Returns more SYNTHETIC reviews, 1,600 train, 600 validation and 600 test.

    Half of their groups are short and plain, as people type them. The others are as those of `sample_reviews`, with
    which they share no draw.

    Args:
        seed: Seed of the grammar, at least 0; the same seed gives the same reviews everywhere.
    """
    return _splits(LARGE_SIZES, _LARGE + seed, PLAIN_SHARE)


def _splits(sizes: Mapping[str, int], seed: int, plain_share: float) -> dict[str, list[dict[str, str]]]:
    splits: dict[str, list[dict[str, str]]] = {}
    seen: set[str] = set()
    group = 0
    for split, size in sizes.items():
        rows: list[dict[str, str]] = []
        while len(rows) < size:
            is_plain = plain_share > 0 and _Draw(seed, group, 6).uniform() < plain_share
            siblings = _group(seed, group, is_train=split == "train", is_plain=is_plain)[: size - len(rows)]
            group += 1
            texts = [row["description"] for row in siblings]
            least = MIN_PLAIN_WORDS if is_plain else MIN_WORDS
            is_new = len(set(texts)) == len(texts) and seen.isdisjoint(texts)
            if is_new and all(least <= len(text.split()) <= MAX_WORDS for text in texts):
                seen.update(texts)
                rows += siblings
        splits[split] = rows
    return splits


def _group(seed: int, group: int, *, is_train: bool, is_plain: bool) -> list[dict[str, str]]:
    draw = _Draw(seed, group)
    plan = {aspect: draw.weighted(CHANCES[aspect]) for aspect in ASPECTS}
    order = draw.shuffled(ASPECTS)
    if is_plain:
        mentioned = order[: 1 + draw.weighted(PLAIN_ASPECTS)]
        plan = {aspect: draw.pick((NEGATIVE, POSITIVE)) if aspect in mentioned else ABSENT for aspect in ASPECTS}
    edits: list[_Edit | None] = [None]
    for aspect in draw.shuffled(ASPECTS)[: draw.weighted(NUM_EDITS)]:
        goals = [state for state in (NEGATIVE, POSITIVE, ABSENT) if state != plan[aspect]]
        edits.append(_Edit(aspect, draw.pick(goals)))
    rows = []
    for number, edit in enumerate(edits):
        states = plan if edit is None else {**plan, edit.aspect: edit.state}
        identity = {
            "id": f"{group:06d}_{number:06d}",
            "original_id": f"{group:06d}",
            "edit_id": f"{number:06d}",
            "is_original": str(edit is None),
            "edit_goal": "" if edit is None else CLASSES[min(edit.state, NEUTRAL)],
            "edit_type": "" if edit is None else edit.aspect,
            "description": (_plain_text if is_plain else _text)((seed, group), order, states),
        }
        rows.append(identity | _labels((seed, group), number, states, is_train))
    return rows


def _labels(key: tuple[int, int], number: int, states: Mapping[str, int], is_train: bool) -> dict[str, str]:
    draw = _Draw(*key, 1, number)
    rating = 3.0
    for aspect, state in states.items():
        rating += WEIGHTS[aspect] * ((state == POSITIVE) - (state == NEGATIVE))
    if draw.uniform() < 0.1:
        rating += draw.pick((-1, 1))
    labels = {"review_majority": str(min(max(round(rating), 1), 5))}
    if is_train and draw.uniform() < 0.08:
        labels["review_majority"] = NO_MAJORITY
    for index, (aspect, state) in enumerate(states.items()):
        # Annotators were not always asked about an aspect that a text does not mention.
        was_asked = state != ABSENT or _Draw(*key, 2, index).uniform() < 0.4
        cell = CLASSES[min(state, NEUTRAL)] if was_asked else ""
        labels[f"{aspect}_aspect_majority"] = NO_MAJORITY if is_train and cell and draw.uniform() < 0.02 else cell
    return labels


def _text(key: tuple[int, int], order: Sequence[str], states: Mapping[str, int]) -> str:
    # The key of every choice is the group and the aspect, so that a sibling differs only where it was edited.
    clauses = []
    for aspect in order:
        index, state = ASPECTS.index(aspect), states[aspect]
        draw = _Draw(*key, 3, index, state)
        num_clauses = 0 if state == ABSENT else 2 if state != NEUTRAL and draw.uniform() < 0.25 else 1
        clauses += [(index, state, _clause(draw, aspect, state)) for _ in range(num_clauses)]
    if not clauses:
        return ""

    def join(one: _Clause, next_one: _Clause) -> str | None:
        if not all(_can_join(clause, state) for _, state, clause in (one, next_one)):
            return None
        return _joined(_Draw(*key, 4, one[0], next_one[0]), one, next_one, (AGREEMENT, CONTRAST))

    sentences = _sentences(clauses, join)
    draw = _Draw(*key, 5)
    if draw.uniform() < 0.4:
        sentences.insert(0, draw.pick(FILLERS))
    if draw.uniform() < 0.15:
        sentences.append(draw.pick(FILLERS))
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)


def _sentences(clauses: list[_Clause], join: Callable[[_Clause, _Clause], str | None]) -> list[str]:
    """Makes sentences of clauses, of two in a row where `join` joins them."""
    sentences = []
    while clauses:
        one, *rest = clauses
        joined = join(one, rest[0]) if rest else None
        sentences.append(one[2] if joined is None else joined)
        clauses = rest if joined is None else rest[1:]
    return sentences


def _joined(draw: _Draw, one: _Clause, next_one: _Clause, forms: tuple[Sequence[str], Sequence[str]]) -> str | None:
    """Joins six in ten pairs of clauses, by the forms of agreement where both have one state, or of contrast."""
    if draw.uniform() >= 0.6:
        return None
    return draw.pick(forms[one[1] != next_one[1]]).format(a=one[2], b=next_one[2])


def _plain_text(key: tuple[int, int], order: Sequence[str], states: Mapping[str, int]) -> str:
    clauses = []
    for aspect in order:
        index, state = ASPECTS.index(aspect), states[aspect]
        if state in (NEGATIVE, POSITIVE):
            clauses.append((index, state, _plain_clause(_Draw(*key, 7, index, state), aspect, state)))

    def join(one: _Clause, next_one: _Clause) -> str | None:
        return _joined(_Draw(*key, 8, one[0], next_one[0]), one, next_one, (PLAIN_AGREEMENT, PLAIN_CONTRAST))

    sentences = _sentences(clauses, join)
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)


def _plain_clause(draw: _Draw, aspect: str, state: int) -> str:
    words, own = lexicon.ASPECTS[aspect], lexicon.PLAIN_ADJECTIVES[aspect]
    # The short statements' own words come as often as all the others together.
    subject = draw.pick(draw.pick((words.subjects, lexicon.PLAIN_SUBJECTS[aspect])))
    adjectives = [draw.pick((draw.pick(words.adjectives[state]), draw.pick(own[state]))) for _ in range(2)]
    form = draw.pick(PLAIN)
    bare = re.sub(r"^(the|our|my) ", "", subject.rstrip("*+"))
    slots = {
        "s": subject.rstrip("*+"),
        "bare": bare,
        "was": "were" if subject.endswith("*") else "was",
        "anti": draw.pick(words.adjectives[1 - state]),
        "strong": draw.pick(words.strong[state]),
        "very": draw.pick(PLAIN_VERY),
    }
    has_degree = re.match(r"(too|so|not|nice) ", adjectives[0])
    is_noun = not subject.startswith(("the ", "our ", "my "))
    is_own_sentence = form.startswith("I loved")
    if (is_own_sentence and (state == NEGATIVE or has_degree)) or ("{bare}" in form and (is_noun or has_degree)):
        form = "{s} {was} {adj}"
    if has_degree or adjectives[0] == adjectives[1]:
        form = form.replace("{very} ", "").replace("{adj} and {adj}", "{adj}")
    for adjective in adjectives[: form.count("{adj}")]:
        form = form.replace("{adj}", adjective, 1)
    return " ".join(form.format(**slots).split())


def _can_join(clause: str, state: int) -> bool:
    return state != NEUTRAL and not re.search(r"[,;]| and ", clause)


def _clause(draw: _Draw, aspect: str, state: int) -> str:
    words = lexicon.ASPECTS[aspect]
    if state == NEUTRAL:
        return draw.pick(words.neutral)
    forms = (STRAIGHT, NEGATED, TURNED, EMPHATIC, words.clauses[state])
    form = draw.pick(forms[draw.weighted(FORMS)])
    subject = draw.pick(words.subjects)
    was = "were" if subject.endswith("*") else "was"
    slots = {
        "s": subject.rstrip("*+"),
        "was": was,
        "it_was": "they were" if subject[-1] in "*+" else "it was",
        "x": draw.pick(words.actors).rstrip("*"),
        "anti": draw.pick(words.adjectives[1 - state]),
        "strong": draw.pick(words.strong[state]),
        "very": draw.pick(VERY),
        "n": draw.pick(NUMBERS),
    }
    adjectives = draw.shuffled(words.adjectives[state])
    # Slots have different adjectives: 'dry and dry' is not English.
    for adjective in adjectives[: form.count("{adj}")]:
        form = form.replace("{adj}", adjective, 1)
    return " ".join(form.format(**slots).split())
