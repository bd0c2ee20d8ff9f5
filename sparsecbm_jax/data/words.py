"""Words of a text as people count them, and the sub-word tokens of each."""

import bisect
import dataclasses
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ZERO_WIDTH_JOINER = "\u200d"


@dataclasses.dataclass(frozen=True)
class Word:
    """A word of a text, and whether the model read it.

    Attributes:
        text: The word.
        start, end: Its place in the text, in characters (Unicode code points), `text[start:end]`.
        is_read: False where the tokeniser truncated or removed it.
    """

    text: str
    start: int
    end: int
    is_read: bool


class Reading(NamedTuple):
    """A text as the tokeniser reads it.

    Attributes:
        words: The words of the text, in order.
        tokens: Token positions of each word, as `batches.tokenize` numbers them.
        is_truncated: True where the end of the text was cut off.
    """

    words: tuple[Word, ...]
    tokens: tuple[tuple[int, ...], ...]
    is_truncated: bool


def read_words(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[Reading]:
    """Splits every text into words, with the positions of their tokens as `batches.tokenize` numbers them.

    Args:
        texts: The texts.
        tokenizer: A fast tokeniser, which gives the character offsets of its tokens.
        max_length: Most tokens of a text, special tokens included.
    """
    encoded = tokenizer(
        list(texts),
        truncation=True,
        max_length=max_length,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    rows = zip(texts, encoded["offset_mapping"], encoded["special_tokens_mask"], encoded.encodings, strict=True)
    return [
        Reading(*_merge_tokens(text, offsets, is_special), bool(encoding.overflowing))
        for text, offsets, is_special, encoding in rows
    ]


def word_spans(text: str) -> list[tuple[int, int]]:
    """Finds start and end of every word: runs of letters and digits, and runs of punctuation or symbols between them.

    Apostrophes and hyphens inside a word, and points and commas inside a number, belong to it; combining marks and
    joiners belong to the character before them. Together the spans cover every character that is not space.

    >>> text = "Wasn't well-made: $3.50!!"
    >>> [text[start:end] for start, end in word_spans(text)]
    ["Wasn't", 'well-made', ':', '$', '3.50', '!!']
    """
    spans: list[tuple[int, int]] = []
    last_kind = ""
    for i in range(len(text)):
        kind = _character_kind(text, i, last_kind)
        if kind and kind == last_kind:
            spans[-1] = (spans[-1][0], i + 1)
        elif kind:
            spans.append((i, i + 1))
        last_kind = kind
    return spans


def printable(text: str, limit: int) -> str:
    r"""Makes a text safe for a terminal: escapes invisible characters, and cuts it after `limit` characters.

    >>> print(printable("a\x1b[31mb and more", 8))
    a\x1b[31mb…
    """
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in cut)


def _character_kind(text: str, i: int, last_kind: str) -> str:
    """Returns the kind of a character: '' for space, 'w' in words, 'p' in punctuation, 's' in symbols."""
    char = text[i]
    if char.isspace():
        return ""
    if char.isalnum() or char == "_":
        return "w"
    category = unicodedata.category(char)
    if last_kind and (category[0] == "M" or char == ZERO_WIDTH_JOINER):
        return last_kind
    around = text[i - 1 : i] + text[i + 1 : i + 2]
    if last_kind == "w" and len(around) == 2:
        if char in "'’-‐‑" and around.isalnum():
            return "w"
        if char in ".," and around.isdigit():
            return "w"
    return "p" if category[0] == "P" else "s"


def _merge_tokens(
    text: str, offsets: Sequence[tuple[int, int]], is_special: Sequence[int]
) -> tuple[tuple[Word, ...], tuple[tuple[int, ...], ...]]:
    """Returns the words of the text and each one's token positions. A token that spans several words joins them."""
    spans = word_spans(text)
    starts = [start for start, _ in spans]
    word_of_token: dict[int, tuple[int, int]] = {}
    joined_with_next = [False] * len(spans)
    for token, ((start, end), special) in enumerate(zip(offsets, is_special, strict=True)):
        piece = text[start:end]
        start += len(piece) - len(piece.lstrip())
        end -= len(piece) - len(piece.rstrip())
        if special or start >= end:
            continue
        first, last = bisect.bisect_right(starts, start) - 1, bisect.bisect_left(starts, end) - 1
        word_of_token[token] = (first, last)
        joined_with_next[first:last] = [True] * (last - first)
    words: list[Word] = []
    tokens: list[list[int]] = []
    merged: list[int] = []
    for i, (start, end) in enumerate(spans):
        if i and joined_with_next[i - 1]:
            words[-1] = dataclasses.replace(words[-1], text=text[words[-1].start : end], end=end)
        else:
            words.append(Word(text[start:end], start, end, False))
            tokens.append([])
        merged.append(len(words) - 1)
    for token, (first, _) in word_of_token.items():
        tokens[merged[first]].append(token)
    words = [dataclasses.replace(word, is_read=bool(pieces)) for word, pieces in zip(words, tokens, strict=True)]
    return tuple(words), tuple(map(tuple, tokens))
