"""What version 0.1.0 left still works: models, logs, corrections, runs, configs; and its names say where they went.

`tests/fixtures/v0_1_0` was made by version 0.1.0 (commit 09376d7), before anything was moved: a backbone of width 16, a
few embedded reviews, a run to its end, the same run stopped under masks, and edits of its model.
"""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import sparsecbm_jax
from sparsecbm_jax.config import moved_names
from sparsecbm_jax.config.run_config import from_config_dict
from sparsecbm_jax.correction.request_file import CorrectionRequest, RequestFile
from sparsecbm_jax.intervention.edit_log import EditLog
from sparsecbm_jax.intervention.stored_edit import StoredEdit
from sparsecbm_jax.model.sparse_cbm import SparseCBM
from sparsecbm_jax.report import read_report

from tests.support.paths import FIXTURES, REPOSITORY

OLD = FIXTURES / "v0_1_0"
# Sums of float32 in another order.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def model() -> SparseCBM:
    return sparsecbm_jax.load(OLD / "model")


def test_a_model_and_its_edits_predict_what_they_did(model: SparseCBM) -> None:
    expected = json.loads((OLD / "predictions.json").read_text())
    with EditLog(OLD / "edits.log", model.masks, model.schema.concepts, is_read_only=True) as log:
        assert len(log.edits) == 2 and len(log.undone) == 1
        edited = sparsecbm_jax.SparseCBM(**{**vars(model), "masks": log.replay(model.masks)})
        requests = RequestFile(OLD / "corrections.jsonl")
        assert requests.of_edits(log.edits) == requests.requests
    assert requests.requests[0] == CorrectionRequest("The food was cold.", "food", "Negative")
    found = sparsecbm_jax.predict(edited, expected["texts"])
    for name in ("concept_probabilities", "label_probabilities"):
        np.testing.assert_allclose(getattr(found, name), expected[name], atol=CLOSE)


def test_an_edit_in_a_file_is_read(model: SparseCBM) -> None:
    edit = StoredEdit.load(OLD / "edit.json")
    assert (edit.concept, edit.target, edit.saliency, len(edit.id)) == ("food", "Negative", "signed", 12)


def test_a_config_is_read() -> None:
    run = from_config_dict(json.loads((OLD / "finished_run" / "run.json").read_text()))
    assert run.strategy == "sparse" and run.data.concepts == ("food", "service")


def test_a_finished_run_is_reported(tmp_path: Path) -> None:
    shutil.copytree(OLD / "finished_run", tmp_path / "run")
    shutil.copytree(OLD / "model", tmp_path / "run" / "model")
    shutil.copy(OLD / "edits.log", tmp_path / "run" / "edits.log")
    report = read_report(tmp_path / "run")
    titles = [section.title for section in report.sections]
    assert {"Evaluation", "Training", "Pruning", "Subnetworks"} <= set(titles), titles


def test_a_stopped_run_goes_on_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its settings name data and backbone relative to the checkout.
    monkeypatch.chdir(REPOSITORY)
    shutil.copytree(OLD / "stopped_run", tmp_path / "run")
    run = from_config_dict(json.loads((OLD / "finished_run" / "run.json").read_text()))
    result = sparsecbm_jax.train(run, tmp_path / "run")
    expected = json.loads((OLD / "metrics.json").read_text())
    assert result.metrics["best_epoch"] == expected["best_epoch"]
    for split in ("validation", "test"):
        for part in ("concept", "task"):
            found = result.metrics[split][part]
            assert found["accuracy"] == expected[split][part]["accuracy"]
            assert found["log_loss"] == pytest.approx(expected[split][part]["log_loss"], abs=1e-3)


def test_a_module_that_moved_says_where_it_is() -> None:
    for name, new in moved_names.MODULES.items():
        assert importlib.import_module(f"sparsecbm_jax.{new}")
        if not (REPOSITORY / "sparsecbm_jax" / Path(*name.split("."))).is_dir():
            with pytest.raises(ImportError, match=rf"since version 0\.2\.0 it is sparsecbm_jax\.{new}"):
                importlib.import_module(f"sparsecbm_jax.{name}")


def test_a_name_that_moved_is_where_it_is_said_to_be() -> None:
    for name, place in moved_names.NAMES.items():
        *owners, attribute = place.partition(" ")[0].split(".")
        count = len(owners)
        while not (REPOSITORY / "sparsecbm_jax" / Path(*owners[:count])).with_suffix(".py").is_file():
            count -= 1
            if not count:
                count = len(owners)
                break
        owner = importlib.import_module(".".join(["sparsecbm_jax", *owners[:count]]))
        for one in owners[count:]:
            owner = getattr(owner, one)
        assert hasattr(owner, attribute), f"{name} is said to be {place}"


def test_old_imports_end_with_a_clear_error() -> None:
    with pytest.raises(ImportError, match=r"it is sparsecbm_jax\.model\.forward"):
        from sparsecbm_jax import cbm  # type: ignore[attr-defined] # noqa: F401
    with pytest.raises(ImportError, match=r"it is sparsecbm_jax\.correction\.correct with editor=intervention\.edit"):
        from sparsecbm_jax.correction import correct_minimally  # type: ignore[attr-defined] # noqa: F401
    with pytest.raises(AttributeError, match=r"it is sparsecbm_jax\.intervention\.ranking\.EditCosts"):
        _ = importlib.import_module("sparsecbm_jax.intervention").Guard
    assert moved_names.hint("woodfisher.qr_inverse") == "; it was removed in version 0.2.0"
    with pytest.raises(AttributeError, match=r"has no attribute 'nonsense'$"):
        _ = importlib.import_module("sparsecbm_jax.intervention").nonsense
