"""Words of a text, and the sub-words that each is made of, whatever the text holds."""

import pytest
from transformers import PreTrainedTokenizerBase

from sparsecbm_jax.data.words import _merge_tokens, printable, read_words, word_spans

from tests.support.tiny_model import TEXTS, tiny_model

HOSTILE = (
    "!!!",
    "\x1b[31mred\x1b[0m",
    "the\x00soup",
    "🎉👍🏽 great ❤️",
    "naïve cafe\u0301 was\u00a0cold",
    "\u202egreat\u202c",
    "great[SEP]food [MASK] [CLS]",
    "a" * 300,
    "don't - 'quote' 3,000.50... e.g., so-so-",
    "料理は美味しい",
    "the\r\n\tfood\u2028was\x0bcold",
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_model(num_layers=1).tokenizer


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The food was great, but", ["The", "food", "was", "great", ",", "but"]),
        ("don't 'quote' so-so- 3,000.50...", ["don't", "'", "quote", "'", "so-so", "-", "3,000.50", "..."]),
        ("cafe\u0301 ❤️!", ["cafe\u0301", "❤️", "!"]),
        ("👩\u200d🍳 said", ["👩\u200d🍳", "said"]),
        (" \n ", []),
        ("", []),
    ],
)
def test_word_spans(text: str, words: list[str]) -> None:
    assert [text[start:end] for start, end in word_spans(text)] == words


@pytest.mark.parametrize("text", [*TEXTS, *HOSTILE], ids=ascii)
def test_words_cover_the_text_and_every_token_is_in_one(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    (reading,) = read_words([text], tokenizer, 512)
    covered = [i for word in reading.words for i in range(word.start, word.end)]
    assert len(covered) == len(set(covered)) and covered == sorted(covered)
    assert all(text[i].isspace() for i in set(range(len(text))) - set(covered))
    assert all(word.text == text[word.start : word.end] for word in reading.words)
    tokens = sorted(token for pieces in reading.tokens for token in pieces)
    # All but the first and the last token, which are special.
    assert tokens == list(range(1, len(tokenizer(text)["input_ids"]) - 1))
    assert [bool(pieces) for pieces in reading.tokens] == [word.is_read for word in reading.words]
    assert not reading.is_truncated


def test_sub_words_are_merged(tokenizer: PreTrainedTokenizerBase) -> None:
    (reading,) = read_words(["Wasn't well-made"], tokenizer, 512)
    assert [word.text for word in reading.words] == ["Wasn't", "well-made"]
    assert all(len(pieces) >= 3 for pieces in reading.tokens)


def test_a_token_over_several_words_joins_them() -> None:
    words, tokens = _merge_tokens("so so-so!! good", [(0, 0), (0, 2), (2, 6), (6, 10), (10, 15)], [1, 0, 0, 0, 0])
    assert [word.text for word in words] == ["so", "so-so!!", "good"]
    assert tokens == ((1,), (2, 3), (4,))


def test_a_long_text_is_cut_and_says_so(tokenizer: PreTrainedTokenizerBase) -> None:
    (reading,) = read_words(["great food " * 50], tokenizer, 12)
    assert reading.is_truncated
    assert [word.is_read for word in reading.words] == [True] * sum(map(bool, reading.tokens)) + [False] * (
        100 - sum(map(bool, reading.tokens))
    )
    assert [token for pieces in reading.tokens for token in pieces] == list(range(1, 11))


def test_printable_escapes_what_a_terminal_would_obey() -> None:
    assert printable("a\x1b[2J\u202eb\n", 99) == r"a\x1b[2J\u202eb\n"
    assert printable("abcdef", 4) == "abc…"
