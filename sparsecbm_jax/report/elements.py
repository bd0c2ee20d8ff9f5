"""The elements of a report: sections of words, figures and tables, which a page or Markdown then shows."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sparsecbm_jax.explanation.pathways import DecisionPathway


class Table(NamedTuple):
    """A table of cells as they are shown; the first column names the rows.

    Attributes:
        caption: Statement of the contents, with their unit.
        head: Names of the columns.
        rows: Rows of cells, each as long as the head.
        is_words: True where cells are words rather than numbers.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_words: bool = False


class Figure(NamedTuple):
    """A picture that is drawn when it is needed.

    Attributes:
        name: Name of its files, without ending.
        caption: Description of the contents; shown below it, and in its place for readers who cannot see it.
        draw: Makes matplotlib's figure, given pyplot.
    """

    name: str
    caption: str
    draw: Callable[[Any], Any]


class Section(NamedTuple):
    """A part of a report with a heading.

    Attributes:
        title: The heading.
        words: Paragraphs.
        figures: Pictures.
        tables: The same in numbers, and numbers that have no picture.
        pathways: Decisions, shown as on the page of pathways; one section of a report may have some.
    """

    title: str
    words: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    pathways: Sequence[DecisionPathway] = ()


def render_markdown(section: Section) -> str:
    """Renders the section's words and numbers as Markdown, under a heading of second rank."""
    return "\n\n".join([f"## {section.title}", *section.words, *map(markdown_table, section.tables)])


def markdown_table(table: Table) -> str:
    """Renders a Markdown table, numbers to the right, without its caption.

    >>> print(markdown_table(Table("", ["editor", "%"], [["none", "12.5"]])))
    | editor | % |
    | --- | ---: |
    | none | 12.5 |
    """
    lines = [table.head, ["---", *["---:"] * (len(table.head) - 1)], *table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(value: float | None, digits: int = 1, *, is_signed: bool = False) -> str:
    """Formats a share in percent; – for None.

    >>> percent(0.1234), percent(-0.1, is_signed=True), percent(None)
    ('12.3', '-10.0', '–')
    """
    if value is None:
        return "–"
    return f"{100 * value:+.{digits}f}" if is_signed else f"{100 * value:.{digits}f}"


def kernel_name(path: str) -> str:
    """Turns a kernel's path into a name for people.

    >>> kernel_name("layers/attention/query/kernel")
    'attention query'
    """
    return path.removeprefix("layers/").removesuffix("/kernel").replace("/", " ").replace("_", " ")
