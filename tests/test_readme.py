"""The examples of README.md run as they stand there."""

import ast
import re
from pathlib import Path

import jax
import pytest

from sparsecbm_jax.config.run_config import from_config_dict
from sparsecbm_jax.model import saved_model

from tests.model.test_forward import random_batch
from tests.support.paths import REPOSITORY
from tests.support.small_sample import small_data
from tests.support.tiny_model import tiny_model

pytestmark = pytest.mark.long

README = REPOSITORY / "README.md"
# Settings of test_training, so that one program does for both.
SMALL_RUN = {
    "backbone": {"name": "tiny"},
    "data": small_data(),
    "optim": {"learning_rate": 1e-3},
    "training": {"num_epochs": 3, "batch_size": 16, "eval_batch_size": 16},
    "sparsity": {"start_epoch": 0, "end_epoch": 1},
    "pruner": {"criterion": "magnitude", "num_grads": 2},
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_python_examples_run(tmp_path: Path) -> None:
    saved_model.save(tiny_model(num_layers=1), tmp_path / "model")
    namespace = {
        "MODEL": tmp_path / "model",
        "WORKDIR": tmp_path,
        "SMALL_RUN": SMALL_RUN,
        "BATCH": random_batch(k=4),
    }
    for source in blocks("python"):
        exec(compile(source, "README.md", "exec"), namespace)
    assert namespace["predictions"].labels.shape == (2,)
    assert namespace["pathway"].to_dict()["text"] == namespace["texts"][0]
    assert "focal_loss" in (tmp_path / "focal" / "metrics.jsonl").read_text()
    assert namespace["result"].metrics["density"]["food"] == pytest.approx(0.5)
    assert jax.numpy.isfinite(namespace["output"].label_logits).all()


def test_commands_name_files_that_exist() -> None:
    root = README.parent
    named = {path for block in blocks("bash") for path in re.findall(r"(?:launch|configs)/[\w.]+", block)}
    assert named
    missing = [path for path in named if not (root / path).is_file()]
    assert not missing


def test_the_small_run_of_the_text_is_valid() -> None:
    (settings,) = re.findall(r"`(\{.*?\})`", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert from_config_dict(ast.literal_eval(settings)).backbone.name == "tiny"


def test_examples_are_about_ten_lines() -> None:
    for source in blocks("python"):
        assert len([line for line in source.splitlines() if line.strip()]) <= 20
