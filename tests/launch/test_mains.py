"""The mains and scripts: config files, messages for people, and set-up that is done once."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from sparsecbm_jax.config.run_config import STRATEGIES, from_config_dict
from sparsecbm_jax.core import masks
from sparsecbm_jax.intervention.edit_log import EditLog
from sparsecbm_jax.model import saved_model
from sparsecbm_jax.model.predictions import predict

from configs import cebab_opt, common
from tests.support.mains import run_main
from tests.support.paths import REPOSITORY
from tests.support.tiny_model import TEXTS, tiny_model

SCRIPTS = [REPOSITORY / ".ci" / "run", *sorted((REPOSITORY / "launch").rglob("*.sh"))]
CONFIGS = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.py"))
# What may stand after the colon of --config=configs/NAME.py:CHOICE; a backbone, where nothing else is said.
CHOICES = {name: tuple(common.BACKBONES) for name in CONFIGS}
CHOICES["imdb_c"] += tuple(f"{name},{kind}" for name in common.BACKBONES for kind in ("manual", "generated"))
CHOICES["cebab_opt"] = tuple(cebab_opt.SCALES)
CHOICES["cebab_minilm"] = CHOICES["imdb_c_minilm"] = STRATEGIES
PAPER_BACKBONES = {
    "distilbert": "distilbert-base-uncased",
    "bert": "bert-base-uncased",
    "roberta": "roberta-base",
    "opt_125m": "facebook/opt-125m",
    "opt_350m": "facebook/opt-350m",
    "opt_1_3b": "facebook/opt-1.3b",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_valid_and_says_how_it_is_run(name: str) -> None:
    module = importlib.import_module(f"configs.{name}")
    from_config_dict(module.get_config())
    for choice in CHOICES[name]:
        config = from_config_dict(module.get_config(choice))
        if choice in STRATEGIES:
            assert config.strategy == choice
        else:
            preset = f"opt_{choice}" if name == "cebab_opt" else choice.split(",")[0]
            assert config.backbone.name == common.BACKBONES[preset].name
    assert f"--config=configs/{name}.py" in (module.__doc__ or "")


@pytest.mark.parametrize("dataset", ["cebab", "imdb_c"])
@pytest.mark.parametrize("backbone", PAPER_BACKBONES)
def test_presets_of_the_papers_table_2(dataset: str, backbone: str) -> None:
    config = from_config_dict(importlib.import_module(f"configs.{dataset}").get_config(backbone))
    assert config.backbone.name == PAPER_BACKBONES[backbone]
    assert config.training.num_epochs == 20 and config.gamma == 5.0
    assert config.training.batch_size == (1 if backbone == "opt_1_3b" else 8)
    assert config.optim.learning_rate in (1e-4, 1e-5, 1e-6)
    assert config.data.preset.startswith(dataset)


def test_misspelt_choices_are_named() -> None:
    with pytest.raises(ValueError, match=r"there is no backbone preset 'brt' .did you mean 'bert'"):
        common.get_config("brt")
    with pytest.raises(ValueError, match="bert,generatd expects one backbone"):
        importlib.import_module("configs.imdb_c").get_config("bert,generatd")


def test_a_config_file_cannot_add_a_key() -> None:
    config: ConfigDict = common.get_config()
    with pytest.raises(AttributeError, match="bach_size"):
        config.training.bach_size = 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config=configs/quickstart.py", "--config.traning.batch_size=4"],
            "error: unknown key config.traning.batch_size; did you mean config.training.batch_size?",
        ),
        (["--config=configs/quikstart.py"], "error: no config file 'configs/quikstart.py'; did you mean configs/quick"),
        (["--config=configs/cebab.py:brt", "--workdir=x"], "error: there is no backbone preset 'brt'"),
        (["--config=configs/quickstart.py", "--wrkdir=x"], "error: unknown flag --wrkdir; did you mean --workdir?"),
        (["--config=configs/quickstart.py", "--config.gamma=-1", "--workdir=x"], "error: config.gamma is -1.0;"),
        (["--config=configs/quickstart.py", "--workdir=my", "run"], "error: 'run' belongs to no flag;"),
    ],
)
def test_train_refuses_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run_main("train.py", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1, result.stderr
    assert not result.stdout and not list(tmp_path.iterdir())


def test_help_is_no_failure() -> None:
    result = run_main("train.py", "--help")
    assert result.returncode == 0 and result.stdout.startswith("Trains, prunes, evaluates"), result.stderr


def test_a_model_is_not_saved_over_itself(tmp_path: Path) -> None:
    given = ["--text=x", "--concept=food", "--target=Positive", "--model=m", "--save=./m"]
    result = run_main("intervene.py", *given, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --save=./m is the model itself")


def test_edits_are_logged_listed_passed_on_and_undone(tmp_path: Path) -> None:
    model = tiny_model(num_layers=1)
    saved_model.save(model, tmp_path / "m")
    text = TEXTS[0]
    service = predict(model, [text]).concepts[0, 2]
    target = model.schema.classes[(service + 1) % 3]
    given = ["--model=m", "--log=edits.log"]
    asked = [f"--text={text}", "--concept=service", f"--target={target}"]
    made = run_main("intervene.py", *given, *asked, "--editor=minimal", cwd=tmp_path)
    assert made.returncode == 0 and "logged: edit" in made.stdout, made.stderr
    with EditLog(tmp_path / "edits.log", model.masks, model.schema.concepts) as log:
        (edit,) = log.edits
        corrected = dataclasses.replace(model, masks=log.replay(model.masks))
    assert model.schema.classes[predict(corrected, [text]).concepts[0, 2]] == target
    edit.save(tmp_path / "one.json")
    undone = run_main("edits.py", *given, f"--undo={edit.id}", cwd=tmp_path)
    assert (undone.returncode, undone.stdout) == (0, "0 active edits in edits.log\n"), undone.stderr
    added = run_main("edits.py", *given, "--add=one.json", "--save=corrected", cwd=tmp_path)
    count = edit.num_changed[0]
    line = (
        f"{edit.id}  service: {edit.before['concepts']['service']} -> {target}, {count} dropped, {count} grown, minimal"
    )
    assert added.stdout.splitlines()[:2] == [line, "1 active edit in edits.log"], added.stderr
    again = saved_model.load(tmp_path / "corrected")
    assert masks.fingerprint(again.masks) == masks.fingerprint(corrected.masks)


def test_a_missing_file_of_texts_is_named(tmp_path: Path) -> None:
    result = run_main("explain.py", "--model=m", "--file=reviews.txt", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --file=reviews.txt: there is no such file")


# Training is another test's matter: this one is what train.py makes of its command line.
STAND_IN = """
import json, runpy, sys, types
training = types.ModuleType("sparsecbm_jax.training")
training.train = lambda config, workdir, profile: print(json.dumps([str(workdir), config.seed, config.data.concepts,
    config.sparsity.final, config.training.num_epochs, config.data.missing_as_unknown, config.strategy]))
summaries = types.ModuleType("sparsecbm_jax.evaluation.run_summary")
summaries.summarise_runs = lambda workdirs: {"runs": [str(path) for path in workdirs]}
summaries.render_summary = lambda summary: json.dumps(summary["runs"])
for module in (training, summaries):
    sys.modules[module.__name__] = module
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_train_hands_over_what_the_command_line_says(tmp_path: Path) -> None:
    arguments = ["--config.training.num_epochs=9", "--config", "configs/quickstart.py", "--workdir=run"]
    arguments += ["--config.data.concepts=food,noise", "--noconfig.data.missing_as_unknown", "--config.strategy=joint"]
    arguments += ["--config.sparsity.final=none", "--seeds=4,7"]
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", STAND_IN, str(REPOSITORY / "launch" / "train.py"), *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rest = [["food", "noise"], None, 9, False, "joint"]
    folders = [str(Path("run", "seed4")), str(Path("run", "seed7"))]
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines == [[folders[0], 4, *rest], [folders[1], 7, *rest], folders]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"runs": folders}


def test_set_up_names_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text('#!/bin/bash\nif [[ "$1" == --version ]]; then echo "Python 3.9.2"; else exit 1; fi\n')
    old.chmod(0o755)
    result = _bash("source launch/setup_env.sh; find_python", PYTHON=str(old))
    assert result.returncode == 2
    assert result.stderr == f"error: PYTHON={old} is Python 3.9.2, but Python 3.11 or later is needed\n"


def test_set_up_installs_once(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\nif [[ "$1 $2" == "-m pip" ]]; then echo pip; else exec {sys.executable} "$@"; fi\n'
    )
    python.chmod(0o755)
    script = f"""
        source launch/setup_env.sh
        VENV={tmp_path} VENV_PYTHON={python}
        install_once test --editable "$(with_extras test)"
        install_once test --editable "$(with_extras test)"
        echo changed
        install_once test --editable "$(EXTRAS=cuda with_extras test)"
        with_extras test report; with_extras
    """
    result = _bash(script)
    assert result.stdout.split() == ["pip", "changed", "pip", ".[test,report]", "."], result.stderr


def _bash(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("EXTRAS", "PYTHON")} | environment
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail\n{script}"], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
