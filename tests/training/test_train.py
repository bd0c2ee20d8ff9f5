"""Whole runs of a tiny model: every strategy, resuming to the bit, NaN, a workdir that is taken, save and load."""

import dataclasses
import gc
import json
from collections import Counter
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsecbm_jax.config.run_config import RunConfig, from_config_dict
from sparsecbm_jax.core import masks as masks_lib
from sparsecbm_jax.core import sharding
from sparsecbm_jax.core.trees import leaf_at
from sparsecbm_jax.data.batches import fisher_batches
from sparsecbm_jax.explanation.pathways import explain
from sparsecbm_jax.model import saved_model
from sparsecbm_jax.model.config import CBMOutput
from sparsecbm_jax.model.losses import LossFn, concept_loss, joint_loss
from sparsecbm_jax.model.predictions import predict
from sparsecbm_jax.model.sparse_cbm import SparseCBM
from sparsecbm_jax.pruning.score_store import StoredScores
from sparsecbm_jax.runtime import checkpoints
from sparsecbm_jax.runtime.run_directory import RunMismatchError, read_run
from sparsecbm_jax.training import loop, setup
from sparsecbm_jax.training.loop import NonFiniteError, TrainingLoop
from sparsecbm_jax.training.run import TrainResult, train
from sparsecbm_jax.training.setup import prepare
from sparsecbm_jax.training.train_step import make_train_step

from tests.support.mains import run_main
from tests.support.small_sample import as_flag, small_data

pytestmark = pytest.mark.long

# Activations in float32, in batches of other widths.
MEAN_TOLERANCE = 1e-4
TEXT = "The soup was lovely but the waiter was rude."


def tiny_run(strategy: str = "sparse", **changes: Any) -> RunConfig:
    base = {
        "strategy": strategy,
        "backbone": {"name": "tiny"},
        "data": small_data(),
        "optim": {"learning_rate": 1e-3},
        "training": {
            "num_epochs": 3,
            "batch_size": 16,
            "eval_batch_size": 16,
            "log_every_steps": 2,
        },
        "sparsity": {"start_epoch": 1, "end_epoch": 2},
        "pruner": {"num_grads": 4, "block_size": 32},
    }
    for section, values in changes.items():
        base[section] = {**base.get(section, {}), **values} if isinstance(values, dict) else values  # type: ignore[dict-item]
    return from_config_dict(base)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(tiny_run(), tmp_path_factory.mktemp("runs") / "whole")


def test_a_run_leaves_what_it_promises(finished: TrainResult) -> None:
    workdir = finished.workdir
    assert {"config.json", "model.safetensors", "masks.safetensors", "metrics.json", "README.md"} <= {
        path.name for path in (workdir / "model").iterdir()
    }
    assert masks_lib.total_density(finished.model.masks).tolist() == [0.5] * 2
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records].count("prune") == 2
    assert [record["kind"] for record in records].count("validation") == 3
    assert finished.metrics["best_epoch"] == 2, "only epochs at the final sparsity may be kept"
    assert finished.metrics["test"]["num_examples"] > 0


def test_a_saved_model_is_pruned_further(finished: TrainResult, tmp_path: Path) -> None:
    folders = [f"--model={finished.workdir / 'model'}", f"--save={tmp_path / 'pruned'}"]
    settings = {
        **{f"data.{key}": value for key, value in small_data().items()},
        "training.eval_batch_size": 16,
        "sparsity.per_concept": "0.8,0.9",
        "pruner.criterion": "magnitude",
    }
    flags = [as_flag(key, value) for key, value in settings.items()]
    result = run_main("prune.py", *folders, "--config=configs/common.py", *flags)
    assert result.returncode == 0, result.stderr
    assert "service: 90.00 %" in result.stdout and "test, as it was:" in result.stdout
    pruned = saved_model.load(tmp_path / "pruned")
    total = masks_lib.num_weights(pruned.masks)
    assert masks_lib.num_kept(pruned.masks).tolist() == [total - round(s * total) for s in (0.8, 0.9)]
    for path, before in finished.model.masks.items():
        assert not (np.asarray(pruned.masks[path]) & ~np.asarray(before)).any(), "what was pruned stays pruned"
    assert pruned.metadata["pruned"]["pruner"]["criterion"] == "magnitude"
    check_mean_activations(pruned)
    chex.assert_trees_all_equal(pruned.params, finished.model.params)


def test_a_sparse_model_learns_from_its_dense_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"distillation": {"weight": 0.5}, "optim": {"rewind": True, "sparse_learning_rate": 2e-3}}
    whole = train(tiny_run(**asked), tmp_path / "whole")
    records = [json.loads(line) for line in (whole.workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    assert ["teacher_distance" in record for record in steps] == [record["epoch"] >= 1 for record in steps]
    # Stopped after the first event, it goes on with what its dense model said.
    with monkeypatch.context() as patched:
        patched.setattr(TrainingLoop, "_end_epoch", stop_after_epoch(1))
        with pytest.raises(KeyboardInterrupt):
            train(tiny_run(**asked), tmp_path / "parts")
    parts = train(tiny_run(**asked), tmp_path / "parts")
    chex.assert_trees_all_equal(parts.model.params, whole.model.params)
    assert parts.metrics["test"] == whole.metrics["test"]


def stop_after_epoch(last: int) -> Any:
    """Returns an end of an epoch that is followed, after epoch `last`, by Ctrl+C."""
    whole = TrainingLoop._end_epoch

    def end_epoch(self: TrainingLoop, epoch: int) -> None:
        whole(self, epoch)
        if epoch == last:
            raise KeyboardInterrupt

    return end_epoch


def test_loading_gives_the_same_predictions_to_the_bit(finished: TrainResult) -> None:
    loaded = saved_model.load(finished.workdir / "model")
    chex.assert_trees_all_equal(predict(loaded, [TEXT]), predict(finished.model, [TEXT]))


def test_a_finished_run_is_given_back_and_another_refused(
    finished: TrainResult, capsys: pytest.CaptureFixture[str]
) -> None:
    again = train(tiny_run(), finished.workdir)
    assert "finished already" in capsys.readouterr().out
    assert again.metrics == json.loads((finished.workdir / "metrics.json").read_text())
    with pytest.raises(RunMismatchError, match=r"gamma"):
        train(dataclasses.replace(tiny_run(), gamma=2.0), finished.workdir)


def test_a_run_that_could_not_start_leaves_the_folder_free(tmp_path: Path) -> None:
    for changes, message in (
        ({"data": {"path": str(tmp_path / "absent")}}, "does not exist"),
        ({"training": {"eval_batch_size": 17}, "mesh": {"data": 2}}, "eval_batch_size is 17; expected a multiple of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tiny_run(**changes), tmp_path / "run")
        assert read_run(tmp_path / "run") is None


def test_another_loss_is_another_run(finished: TrainResult) -> None:
    with pytest.raises(RunMismatchError, match=r"loss_fn: saved nothing, current .*concept_loss"):
        train(tiny_run(), finished.workdir, loss_fn=concept_loss)


def test_fewer_rows_than_a_gradient_averages_are_enough() -> None:
    run = tiny_run(pruner={"grad_batch_size": 4096, "num_grads": 2})
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    split = prepare(run, mesh).splits["train"]
    assert len(fisher_batches(split, run.pruner, seed=0)) == 2


class Stop(KeyboardInterrupt):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """Makes the run end, as Control-C would, when step `stop` is about to run."""
    real = make_train_step

    def make(*args: Any, **kwargs: Any) -> Any:
        step_fn = real(*args, **kwargs)

        def step(state: Any, batch: Any, rng: Any) -> Any:
            if int(state.step) == stop:
                raise Stop
            return step_fn(state, batch, rng)

        return step

    monkeypatch.setattr(loop, "make_train_step", make)


@pytest.mark.parametrize("stop", [4, 7, 15], ids=["dense phase", "right after a pruning event", "last epoch"])
def test_resuming_mid_epoch_continues_to_the_bit(
    stop: int,
    finished: TrainResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tiny_run(training={"save_every_steps": 3})
    with monkeypatch.context() as patch:
        stop_at(patch, stop)
        with pytest.raises(Stop):
            train(run, tmp_path)
    with checkpoints.Checkpointer(tmp_path / "checkpoints") as saved:
        latest = saved.latest_step()
    assert latest in range(stop - 3, stop + 1)
    assert f"stopped in step {stop + 1}; the same command goes on after step {latest}" in capsys.readouterr().out
    resumed = train(run, tmp_path)
    chex.assert_trees_all_equal(resumed.model.params, finished.model.params)
    chex.assert_trees_all_equal(resumed.model.heads, finished.model.heads)
    chex.assert_trees_all_equal(resumed.model.masks, finished.model.masks)
    assert resumed.metrics["train_seconds"] > 0
    whole, log = ((w / "metrics.jsonl").read_text().splitlines() for w in (finished.workdir, tmp_path))
    assert [json.loads(line)["step"] for line in log] == [json.loads(line)["step"] for line in whole]


@pytest.mark.parametrize("of_event", [0, 1])
def test_resuming_within_a_pruning_event_keeps_what_was_scored(
    of_event: int,
    finished: TrainResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, kept, is_stopped = StoredScores.put, list[int](), list[bool]()
    run = tiny_run()

    def put(store: StoredScores, cut: int, concept: int, scores: Any) -> None:
        kept.append(concept)
        if kept.count(1) == 1 + of_event and concept == 1 and not is_stopped:
            is_stopped.append(True)
            raise Stop
        real(store, cut, concept, scores)

    monkeypatch.setattr(StoredScores, "put", put)
    with pytest.raises(Stop):
        train(run, tmp_path)
    resumed = train(run, tmp_path)
    assert "scores of 1 of 2 concepts are there already" in capsys.readouterr().out
    expected = [0, 1, 1, 0, 1] if of_event == 0 else [0, 1, 0, 1, 1]
    assert kept == expected, "that of the first is not made again"
    chex.assert_trees_all_equal(resumed.model.masks, finished.model.masks)
    chex.assert_trees_all_equal(resumed.model.params, finished.model.params)
    assert not (tmp_path / "scores").exists()


def test_scores_of_another_event_are_discarded(tmp_path: Path) -> None:
    scores = {"layers/ffn_in/kernel": jnp.ones((2, 4, 4))}
    with checkpoints.Checkpointer(tmp_path, 4) as kept:
        StoredScores(kept, 4, {"event": 1}).put(1, 0, scores)
        other = StoredScores(kept, 4, {"event": 0})
        with pytest.raises(ValueError, match="event: saved 1, current 0"):
            other.get(1, 0, scores)
        assert other.get(1, 1, scores) is None
        fresh = StoredScores(kept, 4, {"event": 0}, discards_others=True)
        assert len(fresh) == 0 and fresh.get(1, 0, scores) is None


def check_mean_activations(model: SparseCBM) -> None:
    texts = prepare(tiny_run()).dataset.splits["train"].texts
    activations = [list(lane.activations.values()) for one in explain(model, texts) for lane in one.concepts]
    assert model.mean_activations is not None
    found = np.reshape(activations, (len(texts), *model.mean_activations.mean.shape)).mean(axis=0)
    np.testing.assert_allclose(model.mean_activations.mean, found, atol=MEAN_TOLERANCE)


@pytest.mark.parametrize("strategy", ["standard", "independent", "sequential", "joint"])
def test_dense_strategies(strategy: str, tmp_path: Path) -> None:
    result = train(tiny_run(strategy), tmp_path)
    assert result.model.masks is None
    assert ("concept" in result.metrics["test"]) == (strategy != "standard")
    finished = result.metrics["predictor"]
    expected = {"standard": None, "independent": "gold concepts of train", "sequential": "validation"}
    assert strategy == "joint" or finished.get("fitted_on") == expected[strategy]
    assert finished["label_temperature"] > 0 if strategy != "independent" else finished["penalty"] > 0
    loaded = saved_model.load(tmp_path / "model")
    chex.assert_trees_all_equal(predict(loaded, [TEXT]), predict(result.model, [TEXT]))
    assert ("mean_activations" in loaded.metadata) == (strategy != "standard")
    if strategy != "standard":
        check_mean_activations(loaded)


def nan_after(step: int) -> LossFn:
    def loss_fn(config: Any, output: CBMOutput, batch: Any, axes: Any) -> Any:
        loss, parts = joint_loss(config, output, batch, axes)
        poisoned = jnp.any(batch.row_ids == step)
        return jnp.where(poisoned, jnp.nan, loss), parts

    return loss_fn


def test_nan_names_step_rows_and_last_good_checkpoint(tmp_path: Path) -> None:
    run = tiny_run(training={"save_every_steps": 2})
    with pytest.raises(NonFiniteError) as error:
        train(run, tmp_path, loss_fn=nan_after(17))
    text = str(error.value)
    assert "loss is nan" in text
    assert "on train rows [" in text
    rows = json.loads("[" + text.split("[")[1].split("]")[0] + "]")
    assert 17 in rows
    with checkpoints.Checkpointer(tmp_path / "checkpoints") as saved:
        latest = saved.latest_step()
        expected = "no checkpoint was saved yet" if latest is None else f"the last good checkpoint is step {latest}"
    assert expected in text
    step = int(text.split(":")[0].removeprefix("step "))
    assert latest is None or latest < step


def test_early_stopping_is_armed_at_the_final_sparsity_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A frozen model never improves: it stops `patience` epochs after the first epoch that may be kept.
    def step(state: Any, batch: Any, rng: Any) -> Any:
        return state._replace(step=state.step + 1), {"loss": np.float32(1), "grad_norm": np.float32(0)}

    monkeypatch.setattr(loop, "make_train_step", lambda *args, **kwargs: step)
    run = tiny_run(training={"num_epochs": 8, "patience": 2})
    result = train(run, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    epochs = [record["epoch"] for record in records if record["kind"] == "validation"]
    assert epochs == [0, 1, 2, 3, 4]
    assert result.metrics["best_epoch"] == 2


def test_a_sharded_run_is_the_same_run(finished: TrainResult, tmp_path: Path) -> None:
    # What WoodFisher finds on a mesh is another test's matter: test_sharded_pruning.
    run = tiny_run(mesh={"data": 2, "fsdp": 2, "concept": 2}, pruner={"criterion": "magnitude"})
    result = train(run, tmp_path)
    losses, sharded = (
        [json.loads(line) for line in (w / "metrics.jsonl").read_text().splitlines()]
        for w in (finished.workdir, tmp_path)
    )
    first, second = (
        [record["loss"] for record in records if record["kind"] == "train" and record["epoch"] == 0]
        for records in (losses, sharded)
    )
    np.testing.assert_allclose(first, second, atol=1e-4)
    assert masks_lib.total_density(result.model.masks).tolist() == [0.5] * 2
    loaded = saved_model.load(tmp_path / "model")
    expected = predict(result.model, [TEXT])
    np.testing.assert_allclose(predict(loaded, [TEXT]).label_probabilities, expected.label_probabilities, atol=1e-5)


def test_the_values_that_a_run_began_from_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def live() -> Counter[tuple[int, ...]]:
        gc.collect()
        return Counter(leaf.shape for leaf in jax.live_arrays())

    before, kernel = live(), "layers/ffn_in/kernel"

    class Begun(Exception):
        pass

    def stop(loop: Any) -> None:
        shape = leaf_at(loop.state.params, kernel).shape
        loop.log.close()
        assert live()[shape] - before[shape] == 3, "the weights and Adam's two moments"
        raise Begun

    monkeypatch.setattr(TrainingLoop, "run_epochs", stop)
    with pytest.raises(Begun):
        train(tiny_run("joint"), tmp_path)


def test_minilm_that_is_not_installed_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.backbones, "find_minilm", lambda: None)
    with pytest.raises(FileNotFoundError, match=r"backbone.name=tiny"):
        prepare(tiny_run(backbone={"name": "minilm"}))


def test_seeds_differ() -> None:
    one, two = (prepare(dataclasses.replace(tiny_run(), seed=seed)) for seed in (0, 1))
    difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), one.params, two.params)
    assert max(jax.tree.leaves(difference)) > 0
