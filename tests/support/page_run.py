"""Runs the blocks of a page in their order, as a reader would."""

from __future__ import annotations

import doctest
import io
import linecache
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support import pages
from tests.support.pages import Block
from tests.support.shell import Shell


class PageRun:
    """One page: its Python shares a namespace, its shell the folder and the environment.

    Attributes:
        module: whose names its Python reads and sets.
    """

    def __init__(self, page: Path, names: Mapping[str, Any], variables: Mapping[str, Path], shell: Shell) -> None:
        """Prepares a page.

        Args:
            page: its file.
            names: predefined for Python.
            variables: predefined for the shell.
            shell: runs the commands.
        """
        self.page, self._shell = page, shell
        self.module = types.ModuleType(f"page_{page.stem}")
        vars(self.module).update(names)
        self._variables = {name: str(value) for name, value in variables.items()}

    def run(self) -> int:
        """Runs the blocks that are not marked, up to the first that fails; returns how many there were."""
        runnable = [one for one in pages.blocks(self.page) if one.language in pages.EXECUTED and one.not_run is None]
        for block in runnable:
            if block.language == "python":
                self._python(block)
            elif block.language == "pycon":
                self._session(block)
            else:
                self._commands(block)
        return len(runnable)

    def _python(self, block: Block) -> None:
        linecache.checkcache(str(block.page))
        # As if the page were the source, so that a traceback shows its lines.
        code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec", dont_inherit=True)
        try:
            exec(code, vars(self.module))
        except BaseException as error:
            error.add_note(f"in the block at {block.place}")
            raise

    def _session(self, block: Block) -> None:
        parsed = doctest.DocTestParser().get_doctest(block.code, {}, block.place, str(block.page), block.line - 1)
        parsed.globs, printed = vars(self.module), io.StringIO()
        options = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
        failed, _ = doctest.DocTestRunner(optionflags=options).run(parsed, out=printed.write, clear_globs=False)
        if failed:
            pytest.fail(f"{block.place}: another output\n{printed.getvalue()}", pytrace=False)

    def _commands(self, block: Block) -> None:
        done = self._shell.run(block.code, Path.cwd(), self._variables)
        if done.returncode:
            parts = (block.code, done.stdout[-3000:], done.stderr[-6000:])
            pytest.fail(f"{block.place}: status {done.returncode}\n" + "\n".join(parts), pytrace=False)
