"""Griffe extension for the API reference: docstrings as Markdown shows them best.

Doctests stand between paragraphs of text, where Markdown would read them as quotations: they become code blocks.
'Reference:' and 'Deviation:' start a paragraph. Names that share a description each get it. Example calls, lists and
flags of a command's help become code. Fields that the class's docstring documents are not listed again.
"""

import re

import griffe

_DOCTEST = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?P=indent) *\S.*)*", re.MULTILINE)
_HELP = re.compile(r"^(?:(?:\w+=\S+ )?sparsecbm | +\S).*(?:\n(?:(?:\w+=\S+ )?sparsecbm | +\S).*)*", re.MULTILINE)
# With code that stands there already, which stays.
_FLAG = re.compile(r"`[^`]*`|(?<![\w-])--[a-z][\w.]*(?:=[\w/.=,]*\w)?")
_SHARED = re.compile(r"^ {4}(?P<names>\w+(?:, \w+)+):(?P<text>.*(?:\n {5,}.*)*)", re.MULTILINE)
_LABEL = re.compile(r"^(Reference|Deviation|Chance)([:.])(?= )", re.MULTILINE)


def readable(docstring: str) -> str:
    """Returns the docstring with fenced doctests and with its labelled remarks as paragraphs."""
    fenced = _DOCTEST.sub(lambda found: f"{found['indent']}```pycon\n{found[0]}\n{found['indent']}```", docstring)
    apart = _SHARED.sub(lambda item: "\n".join(f"    {n}:{item['text']}" for n in item["names"].split(", ")), fenced)
    return _LABEL.sub(r"\n**\1\2**", apart)


def command_help(docstring: str) -> str:
    """Returns the docstring of a command with its calls, lists and flags as code."""
    parts = _HELP.sub(r"```text\n\g<0>\n```", docstring).split("```")
    parts[::2] = [_FLAG.sub(lambda found: f"`{found[0].strip('`')}`", part) for part in parts[::2]]
    return "```".join(parts)


class ReadableDocstrings(griffe.Extension):
    """Changes what mkdocstrings collects from the package."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Rewrites the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = readable(obj.docstring.value)
            if obj.is_module and obj.path.startswith("sparsecbm_jax.commands."):
                obj.docstring.value = command_help(obj.docstring.value)

    def on_class_members(self, *, cls: griffe.Class, **kwargs: object) -> None:
        """Drops the second description of fields that a class documents."""
        if cls.docstring and re.search(r"^(Attributes|Args):$", cls.docstring.value, re.MULTILINE):
            for member in cls.members.values():
                if isinstance(member, griffe.Attribute) and not member.docstring and not member.has_labels("property"):
                    member.public = False
