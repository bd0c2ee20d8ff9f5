"""Misspelt names and the nearest ones."""

import doctest

import pytest

from sparsecbm_jax.config import names


def test_doctests() -> None:
    results = doctest.testmod(names)
    assert results.attempted and not results.failed


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("positiv", ["Negative", "Positive"], "Positive"),
        ("POSITIVE", ["Negative", "Positive"], "Positive"),
        ("a1.bias", ["a.bias", "b.bias"], "a.bias"),
        ("one.two.bias", ["a.b.weight", "c.bias"], "c.bias"),
        ("food", [], None),
        ("food", ["service"], None),
    ],
)
def test_nearest_name(name: str, known: list[str], expected: str | None) -> None:
    assert names.nearest_name(name, known) == expected
    words = names.did_you_mean(name, known, "; did you mean --{}?")
    assert words == ("" if expected is None else f"; did you mean --{expected}?")


def test_names_alike_to_a_degree() -> None:
    assert names.nearest_name("food", ["foot", "foods"], cutoff=0.8) == "foods"
    assert names.nearest_name("food", ["foot"], cutoff=0.8) is None


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    assert names.name_index("concept", "service", ("food", "service")) == 1
    with pytest.raises(ValueError, match=r"no concept 'foood' \(did you mean 'food'\?\); expected one of 'food', 'x'"):
        names.name_index("concept", "foood", ("food", "x"))
