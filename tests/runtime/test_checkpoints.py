"""Checkpoints: bits survive, meshes may change, damage and misfit are named."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparsecbm_jax.config.run_config import RunConfig, to_dict
from sparsecbm_jax.runtime.checkpoints import Checkpointer, CheckpointError
from sparsecbm_jax.runtime.json_files import write_atomically
from sparsecbm_jax.runtime.run_directory import RunMismatchError, check_same_run, read_run

from tests.support.paths import REPOSITORY


class State(NamedTuple):
    params: dict
    masks: dict
    step: jax.Array
    rng: jax.Array


def make_state(seed: int = 0) -> State:
    rng = jax.random.key(seed)
    return State(
        params={
            "layers": {"kernel": jax.random.normal(rng, (2, 8, 16)), "half": jnp.full((3,), 1.1, jnp.bfloat16)},
            "finish": {},
            "none": jnp.zeros((0, 4)),
            "odd": jnp.array([np.nan, -0.0, np.inf, 1e-40], jnp.float32),
        },
        masks={"layers/kernel": jax.random.bernoulli(rng, 0.5, (2, 8, 16)), "bits": jnp.arange(256, dtype=jnp.uint8)},
        step=jnp.int32(7),
        rng=jax.random.split(rng, 3),
    )


def abstract(tree, sharding_fn=lambda leaf: None):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_fn(leaf)), tree)


def assert_same_bits(found, expected):
    chex.assert_trees_all_equal_structs(found, expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def biggest_file(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_round_trip_keeps_every_bit(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.latest_step() is None
        checkpointer.save(7, state, {"epoch": 1, "best": 0.5, "history": [1, 2]})
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.latest_step() == 7
        assert checkpointer.read_meta(7) == {"epoch": 1, "best": 0.5, "history": [1, 2]}
        restored = checkpointer.restore(7, abstract(state))
        assert_same_bits(restored, state)
        assert_same_bits(checkpointer.restore(7, state), state)
    chex.assert_trees_all_equal(jax.random.uniform(restored.rng[1]), jax.random.uniform(state.rng[1]))


def test_what_is_saved_may_be_donated_before_it_is_written(tmp_path, monkeypatch):
    goes_on = threading.Event()
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.arange(2.0**16)
    with Checkpointer(tmp_path) as checkpointer:
        writes = checkpointer._manager.wait_until_finished
        monkeypatch.setattr(checkpointer._manager, "wait_until_finished", lambda: (goes_on.set(), writes()))
        checkpointer.save(0, {"x": x})
        assert goes_on.is_set(), "what was being written before is waited for"
        goes_on.clear()
        for _ in range(3):
            x = step(x)
        assert not goes_on.is_set(), "saving does not wait for itself"
        assert checkpointer.restore(0, {"x": x})["x"].tolist() == list(range(2**16))
    assert float(x[0]) == 3


def test_restores_onto_another_mesh(tmp_path):
    devices = np.array(jax.devices())
    if devices.size < 8:
        pytest.skip("needs 8 (virtual) devices")
    saving, restoring = Mesh(devices.reshape(8), ("fsdp",)), Mesh(devices.reshape(2, 4), ("data", "tensor"))
    spec = {3: PartitionSpec(None, "fsdp"), 2: PartitionSpec(), 1: PartitionSpec(), 0: PartitionSpec()}
    state = make_state()
    sharded = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(saving, spec[leaf.ndim])), state)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, sharded)
        target = abstract(
            state,
            lambda leaf: NamedSharding(
                restoring, PartitionSpec(None, "data", "tensor") if leaf.ndim == 3 else PartitionSpec()
            ),
        )
        restored = checkpointer.restore(0, target)
        assert_same_bits(checkpointer.restore(0, abstract(state)), state)
    assert_same_bits(restored, state)
    assert restored.params["layers"]["kernel"].sharding.spec == PartitionSpec(None, "data", "tensor")
    assert restored.params["layers"]["kernel"].addressable_shards[0].data.shape == (2, 4, 4)


def test_keeps_the_latest_and_drops_an_abandoned_future(tmp_path):
    with Checkpointer(tmp_path, max_to_keep=2) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"x": jnp.full((4,), step)})
        assert checkpointer.steps() == (2, 3)
        checkpointer.save(2, {"x": jnp.full((4,), 9)})
        assert checkpointer.steps() == (2,)
        assert checkpointer.restore(2, {"x": jnp.zeros((4,), jnp.int32)})["x"].tolist() == [9] * 4


def test_misfit_names_every_leaf_with_both_shapes(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, {"a": {"kernel": jnp.zeros((4, 3)), "old": jnp.zeros(2)}, "same": jnp.ones(1)})
        wrong = {"a": {"kernel": jnp.zeros((4, 2)), "new": jnp.zeros(5)}, "same": jnp.ones(1, jnp.int32)}
        with pytest.raises(CheckpointError) as error:
            checkpointer.restore(0, wrong)
        message = str(error.value)
        for line in (
            "a/kernel: saved [4, 3] float32, expected [4, 2] float32",
            "a/old: saved [2] float32, expected nothing",
            "a/new: saved nothing, expected [5] float32",
            "same: saved [1] float32, expected [1] int32",
        ):
            assert line in message
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 5, only of \[0\]"):
            checkpointer.restore(5, wrong)


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped", "meta"])
def test_damage_is_found_and_an_earlier_whole_step_named(tmp_path, damage):
    # Large enough that the values lie in a file of their own, and not all equal, so that compression keeps a byte to
    # flip.
    tree = {"layers": {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}}
    with Checkpointer(tmp_path, max_to_keep=3) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, tree)
    victim = biggest_file(tmp_path / "3") if damage != "meta" else tmp_path / "3" / "meta" / "metadata"
    content = bytearray(victim.read_bytes())
    if damage == "missing":
        victim.unlink()
    elif damage == "flipped":
        content[len(content) // 2] ^= 0x10
        victim.write_bytes(content)
    else:
        victim.write_bytes(content[: len(content) // 2])
    with Checkpointer(tmp_path, max_to_keep=3) as checkpointer:
        with pytest.raises(CheckpointError, match="damaged") as error:
            checkpointer.restore(3, tree)
        assert str(tmp_path / "3") in str(error.value)
        assert ("step 2 is whole" if damage != "meta" else "earlier steps: [1, 2]") in str(error.value)
        if damage == "flipped":
            assert "layers/kernel" in str(error.value)
        assert_same_bits(checkpointer.restore(2, tree), tree)
        # A run that goes on from there saves step 3 anew.
        checkpointer.save(3, tree)
        assert_same_bits(checkpointer.restore(3, tree), tree)


def test_nothing_whole_is_said(tmp_path):
    tree = {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree)
        checkpointer.wait()
        victim = biggest_file(tmp_path / "1")
        victim.write_bytes(victim.read_bytes()[:-10])
        with pytest.raises(CheckpointError, match=r"expected \d+ bytes; no earlier step is whole"):
            checkpointer.restore(1, tree)


def test_save_refuses_what_it_could_not_give_back(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(TypeError, match="count is int64"):
            checkpointer.save(0, {"count": np.arange(3, dtype=np.int64)})
        with pytest.raises(TypeError, match="JSON serializable"):
            checkpointer.save(0, {"x": jnp.zeros(1)}, {"path": tmp_path})
        with pytest.raises(ValueError, match="both named 'a/b'"):
            checkpointer.save(0, {"a": {"b": jnp.zeros(1)}, "a/b": jnp.zeros(1)})
        assert checkpointer.steps() == ()


CONFIG = {
    "seed": 0,
    "data": {"concepts": ("food", "noise")},
    "training": {"num_epochs": 3, "log_every_steps": 10},
    "empty": {},
}


def test_first_use_claims_the_workdir_and_the_same_run_passes(tmp_path):
    workdir = tmp_path / "run"
    assert read_run(workdir) is None
    check_same_run(workdir, CONFIG)
    assert json.loads((workdir / "run.json").read_text())["seed"] == 0
    assert sorted(path.name for path in workdir.iterdir()) == ["run.json"]
    check_same_run(workdir, CONFIG)


def test_a_different_run_is_refused_with_every_key(tmp_path):
    check_same_run(tmp_path, CONFIG)
    other = {**CONFIG, "seed": 1, "training": {"num_epochs": 4, "log_every_steps": 1}, "new": True}
    with pytest.raises(RunMismatchError) as error:
        check_same_run(tmp_path, other, ignore=("training.log_every_steps",))
    message = str(error.value)
    assert "holding a different run" in message and str(tmp_path) in message
    for line in (
        "seed: saved 0, current 1",
        "training.num_epochs: saved 3, current 4",
        "new: saved nothing, current true",
    ):
        assert line in message
    assert "log_every_steps" not in message
    check_same_run(tmp_path, other, ignore=("training", "seed", "new"))


def test_damaged_run_file_is_named(tmp_path):
    (tmp_path / "run.json").write_text('{"seed": ')
    with pytest.raises(RunMismatchError, match=r"run\.json is not JSON"):
        check_same_run(tmp_path, CONFIG)


def test_write_atomically_leaves_no_part_behind(tmp_path):
    write_atomically(tmp_path / "a.txt", "old")
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "a.txt", None)  # type: ignore[arg-type]
    assert (tmp_path / "a.txt").read_text() == "old"
    write_atomically(tmp_path / "a.txt", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "new"


def test_devices_of_a_cpu_do_not_wait_for_each_other_in_different_programs() -> None:
    """In a process of its own, which would never end."""
    program = """
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from sparsecbm_jax.core import sharding
from sparsecbm_jax.runtime import checkpoints
placed = jax.sharding.NamedSharding(sharding.make_mesh(data=2, fsdp=2, concept=2), jax.sharding.PartitionSpec("fsdp"))
leaves = {str(n): jax.device_put(jax.numpy.ones((16 * (1 + n % 8), 64)), placed) for n in range(60)}
for _ in range(400):
    checkpoints._checksums(leaves)
"""
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True, timeout=120)


def test_a_run_goes_on_that_began_before_a_setting_came(tmp_path: Path) -> None:
    now = to_dict(RunConfig())
    before = {name: part for name, part in now.items() if name != "distillation"}
    before["optim"] = {key: value for key, value in now["optim"].items() if key != "rewind"}
    check_same_run(tmp_path, before)
    check_same_run(tmp_path, now)
    with pytest.raises(RunMismatchError, match=r"optim\.rewind: saved false, current true"):
        check_same_run(tmp_path, {**now, "optim": {**now["optim"], "rewind": True}})
    with pytest.raises(RunMismatchError, match=r"distillation\.weight: saved 0\.0, current 0\.5"):
        check_same_run(tmp_path, {**now, "distillation": {**now["distillation"], "weight": 0.5}})
