"""Whether commands that a page shows could be given: their files are there, and so are their flags."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator, Sequence

from sparsecbm_jax.config.run_config import key_names

from tests.support.paths import REPOSITORY
from tests.support.shell import Shell

_PYTHON = re.compile(r"(?:.*/)?python[\d.]*|\$\{?PYTHON\}?")
_SHELLS = ("bash", "sh", "sbatch", "source", ".")
_FLAG = re.compile(r"--?(?P<name>[A-Za-z_][\w.]*)(?:=.*)?", re.DOTALL)
_HELP = re.compile(r"^ +(?:-\w,)?--(?P<no>\[no\])?(?P<name>\w+):", re.MULTILINE)
_CONFIG = re.compile(r"--config=configs/(?P<name>\w+)\.py(?::(?P<choice>.+))?")


class CommandCheck:
    """Checks commands; each program is asked for its flags once."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._flags_of = functools.cache(self._asked)

    def problems(self, words: Sequence[str]) -> Iterator[str]:
        """Says what is wrong with a command; nothing of programs that are not ours."""
        program, *rest = words
        if program in _SHELLS and rest and rest[0].startswith("launch/"):
            yield from self._missing(rest[0])
        elif program == "sparsecbm" and rest:
            yield from self._wrong_flags(("sparsecbm", rest[0]), rest[1:])
        elif _PYTHON.fullmatch(program) and rest[:2] == ["-m", "sparsecbm_jax"]:
            yield from self._wrong_flags(("sparsecbm", rest[2]), rest[3:])
        elif _PYTHON.fullmatch(program) and rest and rest[0].startswith("launch/"):
            yield from self._missing(rest[0]) or self._wrong_flags(("python", rest[0]), rest[1:])

    def _missing(self, file: str) -> list[str]:
        return [] if (REPOSITORY / file).is_file() else [f"there is no {file}"]

    def _wrong_flags(self, command: tuple[str, ...], arguments: Sequence[str]) -> Iterator[str]:
        known = self._flags_of(command)
        for argument in arguments:
            flag = _FLAG.fullmatch(argument)
            if not flag:
                continue
            name, _, key = flag["name"].partition(".")
            if name not in known:
                yield f"{' '.join(command)} has no --{name}"
            elif key and key not in key_names():
                yield f"there is no setting config.{key}"
            elif config := _CONFIG.fullmatch(argument):
                yield from self._wrong_config(config["name"], config["choice"])

    def _wrong_config(self, name: str, choice: str | None) -> Iterator[str]:
        missing = self._missing(f"configs/{name}.py")
        yield from missing
        if not missing:
            try:
                importlib.import_module(f"configs.{name}").get_config(*([choice] if choice else []))
            except ValueError as error:
                yield f"configs/{name}.py: {error}"

    def _asked(self, command: tuple[str, ...]) -> frozenset[str]:
        done = self._shell.run(" ".join((*command, "--helpfull")), REPOSITORY)
        if done.returncode:
            raise AssertionError(f"{' '.join(command)} --helpfull: {done.stdout}\n{done.stderr}")
        found = list(_HELP.finditer(done.stdout))
        return frozenset({one["name"] for one in found} | {f"no{one['name']}" for one in found if one["no"]})
