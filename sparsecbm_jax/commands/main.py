"""Explains, corrects, serves, evaluates and trains concept bottleneck models: sparsecbm COMMAND --flags.

sparsecbm train --data=DIR --text=review --label=stars --concepts=food,service --workdir=runs/mine
sparsecbm explain --model=runs/mine/model --text="The food was great, but the waiter was rude."
sparsecbm correct --model=runs/mine/model --text="The waiter was rude." --concept=service --target=Negative
"""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

from sparsecbm_jax.config.names import did_you_mean

COMMANDS = {
    "train": "train, prune, evaluate and save a model on your own table or a config's data",
    "explain": "show the concepts behind a prediction, and the words behind each concept",
    "correct": "correct one concept of one text by changing a few weights of its mask",
    "edits": "list, undo, merge and pass on corrections that were logged",
    "serve": "serve the live page of a model: explain, correct, preview, apply, undo",
    "evaluate": "print the scores of a model on a split",
    "report": "write the report of a run as one page",
}
_PROGRAM = "sparsecbm"


def main() -> NoReturn:
    """Runs the command that the command line names; a misspelt one ends with the nearest name and status 2."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-help", "-h"):
        print(_usage())
        sys.exit(0)
    if name == "--version":
        from sparsecbm_jax.version import __version__

        print(f"{_PROGRAM} {__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        print(f"error: {_mistake(name)}", file=sys.stderr)
        sys.exit(2)
    # absl names the program so, and keeps the flags that --help shows by this name.
    sys.argv = [f"{_PROGRAM} {name}", *arguments]
    run(name)


def run(name: str, program: str | None = None) -> NoReturn:
    """Runs one command with the flags of `sys.argv`.

    Args:
        name: one of `COMMANDS`; only its module is imported.
        program: what is typed to start it, for `--help`; by default `sparsecbm NAME`.
    """
    from sparsecbm_jax.cli import command_line

    command = importlib.import_module(f"sparsecbm_jax.commands.{name}")
    own = f"{_PROGRAM} {name}"
    command_line.present(command, (command.__doc__ or "").replace(own, program or own))
    # A server answers for days: what one request has freed goes back.
    command_line.run(command.main, keeps_memory=name != "serve")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    more = f"`{_PROGRAM} COMMAND --help` shows the flags of one; `{_PROGRAM} --version` the version."
    return "\n".join([(__doc__ or "").strip(), "", "commands:", *lines, "", more])


def _mistake(name: str) -> str:
    expected = f"expected one of {', '.join(COMMANDS)}"
    if name.startswith("-"):
        return f"{name} stands before the command; {expected}, and flags after it"
    return f"there is no command {name!r}{did_you_mean(name, COMMANDS)}; {expected}"


if __name__ == "__main__":
    main()
