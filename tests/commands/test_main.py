"""What `sparsecbm` makes of its command line: names, help, versions and flags that are gone."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from sparsecbm_jax.commands.main import COMMANDS
from sparsecbm_jax.version import __version__

from tests.support.mains import run_main
from tests.support.paths import REPOSITORY

# Commands whose file in launch/ has another name.
LAUNCH = {"correct": "intervene.py"}
PRINTS_ITS_MODULES = """
import atexit, sys
from sparsecbm_jax.commands.main import main
atexit.register(lambda: print("modules:", *sys.modules))
main()
"""


def sparsecbm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparsecbm_jax", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def imported(*arguments: str) -> set[str]:
    """The modules that a command line imports."""
    command = [sys.executable, "-c", PRINTS_ITS_MODULES, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.partition("modules: ")[2].split())


def test_without_a_command_the_commands_are_listed() -> None:
    asked = sparsecbm("--help")
    assert asked.returncode == 0 and asked.stdout.startswith("Explains, corrects, serves"), asked.stderr
    assert re.findall(r"^  (\w+)  ", asked.stdout, flags=re.MULTILINE) == list(COMMANDS)
    assert sparsecbm().stdout == asked.stdout


def test_the_version_is_printed() -> None:
    assert sparsecbm("--version").stdout == f"sparsecbm {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["explian", "--text=x"],
            "error: there is no command 'explian' (did you mean 'explain'?); expected one of train,",
        ),
        (["frobnicate"], "error: there is no command 'frobnicate'; expected one of train, explain,"),
        (["--text=x", "explain"], "error: --text=x stands before the command; expected one of train, explain,"),
    ],
)
def test_a_command_that_does_not_exist_ends_with_one_line(arguments: list[str], message: str) -> None:
    done = sparsecbm(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr


def test_only_the_chosen_command_is_imported() -> None:
    listing = imported("--help")
    assert "sparsecbm_jax.commands.main" in listing
    assert not listing & {"absl", "jax", "ml_collections", "numpy"}
    chosen = {name for name in imported("edits", "--help") if name.startswith("sparsecbm_jax.commands.")}
    assert chosen == {"sparsecbm_jax.commands.main", "sparsecbm_jax.commands.edits"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_of_the_command_and_its_file_in_launch_has_the_same_flags(name: str) -> None:
    done = sparsecbm(name, "--help")
    assert done.returncode == 0 and not done.stderr, done.stderr
    text, _, flags = done.stdout.partition("\nflags:\n")
    assert f"\nsparsecbm {name} --" in text
    assert flags.startswith(f"\nsparsecbm {name}:\n") and "--[no]debug" in flags
    assert re.search(r"^  --(model|workdir): ", flags, flags=re.MULTILINE)
    file = LAUNCH.get(name, f"{name}.py")
    launched = run_main(file, "--help")
    assert launched.returncode == 0, launched.stderr
    their_text, _, their_flags = launched.stdout.partition("\nflags:\n")
    assert their_text == text.replace(f"sparsecbm {name}", f"python launch/{file}")
    assert their_flags.partition(":\n")[2] == flags.partition(":\n")[2]


def test_a_message_names_the_nearest_flag_of_the_command() -> None:
    done = sparsecbm("explain", "--modle=m")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown flag --modle; did you mean --model?\n"


@pytest.mark.parametrize(
    ("file", "flag", "hint"),
    [
        ("explain.py", "--json", "it is now --format=json"),
        ("explain.py", "--csv", "it is now --format=csv"),
        ("explain.py", "--html=pathways.html", "it is now --format=html --output=FILE"),
        ("intervene.py", "--minimal", "it is now --editor=minimal"),
        ("intervene.py", "--lasting=corrections.jsonl", "it is now --editor=continual --requests=FILE"),
        ("evaluate.py", "--suite=intervention", "corrections are evaluated by launch/evaluate_interventions.py"),
        ("serve.py", "--lasting=", "--lasting=FILE is now --requests=FILE, and --lasting= is --editor=minimal"),
    ],
)
def test_flags_of_earlier_versions_name_what_took_their_place(file: str, flag: str, hint: str) -> None:
    done = run_main(file, "--model=m", flag)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: unknown flag {flag.partition('=')[0]}; ") and hint in done.stderr
