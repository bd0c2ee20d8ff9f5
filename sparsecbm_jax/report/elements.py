"""What a report is made of: sections of words, figures and tables, which a page or Markdown then shows."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sparsecbm_jax.explanation.pathways import DecisionPathway


class Table(NamedTuple):
    """Cells as they are shown; the first column names the rows.

    Attributes:
        caption: what it states, with its unit.
        head: names of the columns.
        rows: as long as the head, each.
        is_words: whether cells are words rather than numbers.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_words: bool = False


class Figure(NamedTuple):
    """A picture that is drawn when it is wanted.

    Attributes:
        name: of its files, without ending.
        caption: what it shows; stands below it, and in its place for who cannot see it.
        draw: makes matplotlib's figure, given pyplot.
    """

    name: str
    caption: str
    draw: Callable[[Any], Any]


class Section(NamedTuple):
    """A part of a report with a heading.

    Attributes:
        title: the heading.
        words: a paragraph each.
        figures: pictures.
        tables: the same in numbers, and what has no picture.
        pathways: decisions to be shown as the page of pathways shows them; one section of a report may have some.
    """

    title: str
    words: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    pathways: Sequence[DecisionPathway] = ()


def render_markdown(section: Section) -> str:
    """The section's words and numbers, under a heading of second rank."""
    return "\n\n".join([f"## {section.title}", *section.words, *map(markdown_table, section.tables)])


def markdown_table(table: Table) -> str:
    """A Markdown table, numbers to the right; its caption is left out.

    >>> print(markdown_table(Table("", ["arm", "%"], [["none", "12.5"]])))
    | arm | % |
    | --- | ---: |
    | none | 12.5 |
    """
    lines = [table.head, ["---", *["---:"] * (len(table.head) - 1)], *table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(value: float | None, digits: int = 1, *, is_signed: bool = False) -> str:
    """A share in percent; – for None.

    >>> percent(0.1234), percent(-0.1, is_signed=True), percent(None)
    ('12.3', '-10.0', '–')
    """
    if value is None:
        return "–"
    return f"{100 * value:+.{digits}f}" if is_signed else f"{100 * value:.{digits}f}"


def kernel_name(path: str) -> str:
    """A kernel's name for people.

    >>> kernel_name("layers/attention/query/kernel")
    'attention query'
    """
    return path.removeprefix("layers/").removesuffix("/kernel").replace("/", " ").replace("_", " ")
