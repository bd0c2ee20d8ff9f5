"""Plans: what is counted of tiny programs on eight devices, shardings of the large configs, and what is refused."""

import dataclasses
import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from sparsecbm_jax import backbones
from sparsecbm_jax.config.run_config import MeshConfig, RunConfig, from_config_dict
from sparsecbm_jax.core import sharding
from sparsecbm_jax.planning import plan, programs
from sparsecbm_jax.runtime import accelerators

from tests.support.mains import run_main
from tests.support.paths import REPOSITORY

GOLDEN = REPOSITORY / "tests" / "planning" / "golden_shardings.json"
SCALED = [f"cebab_opt:{size}" for size in ("125m", "350m", "1_3b", "6_7b", "13b", "30b", "66b")]
LENGTH, BATCH = 32, 8
SHAPE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 128}

# The compiler for TPUs is an extra of its own, and large: the suite does without it where it is not installed.
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu not here: pip install '.[tpu-plan]'"
)


def scaled(name: str) -> RunConfig:
    config, _, size = name.partition(":")
    return from_config_dict(importlib.import_module(f"configs.{config}").get_config(size))


def shapes_of(run: RunConfig) -> programs.Shapes:
    return programs.Shapes(run, programs.abstract_mesh(run.mesh))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A three-layer OPT on eight devices."""
    folder = tmp_path_factory.mktemp("opt")
    config = {"model_type": "opt", "vocab_size": 96, "max_position_embeddings": 64, "dropout": 0.0, **SHAPE}
    (folder / "config.json").write_text(json.dumps(config))
    return from_config_dict(
        {
            "backbone": {"name": str(folder), "remat": "full"},
            "data": {"preset": "cebab", "max_length": LENGTH, "concepts": ("food", "noise")},
            "training": {"batch_size": BATCH, "eval_batch_size": BATCH},
            "pruner": {"num_grads": 8, "block_size": 8, "grad_batch_size": 2},
            "mesh": {"fsdp": 4, "tensor": 2},
        }
    )


CPUS = accelerators.parse_topology("cpu:8")


@pytest.fixture(scope="module")
def found(run: RunConfig) -> dict[str, dict[str, Any]]:
    return {name: plan.measure(run, CPUS, name) for name in ("train_step", "eval_step", "select")}


def test_the_pruners_and_the_interventions_programs_are_traced(run: RunConfig) -> None:
    shapes = programs.Shapes(run, plan.mesh_of(run, CPUS))
    parts = [*programs.parts_of("prune_pass", shapes), *programs.parts_of("intervene", shapes)]
    assert [part.name for part in parts] == ["activations", "gradient", "cut", "add", "score", "intervene"]
    for part in parts:
        assert "sharding" in part.lower().as_text(), part.name
    assert parts[0].beside > programs.bytes_of(shapes.opt_state), "Adam's moments stay while masks are scored"
    dense = programs.Shapes(dataclasses.replace(run, strategy="joint"), shapes.mesh)
    assert not programs.parts_of("prune_pass", dense)


def test_the_programs_of_exchanges_are_traced(run: RunConfig) -> None:
    pruner = dataclasses.replace(run.pruner, criterion="combinatorial")
    shapes = programs.Shapes(dataclasses.replace(run, pruner=pruner), plan.mesh_of(run, CPUS))
    parts = programs.parts_of("prune_pass", shapes)
    assert [part.name for part in parts] == ["gradient", "inputs", "swap"]
    for part in parts:
        assert "sharding" in part.lower().as_text(), part.name
        assert part.beside > programs.bytes_of(shapes.opt_state), "Adam's moments stay meanwhile"


def test_the_programs_fit_and_are_counted(found: dict[str, dict[str, Any]]) -> None:
    for name, program in found.items():
        assert program["fits"] and program["peak_bytes_per_chip"] > 0, name
        assert program["wire_bytes_per_chip"] > 0 and program["seconds"] > 0, name
    assert 1 < found["train_step"]["flops_ratio"] < 4 / 3 + 0.02
    assert found["eval_step"]["flops_ratio"] == pytest.approx(1, rel=0.02)
    assert found["select"]["flops_ratio"] is None
    assert "all-gather" not in found["select"]["num_collectives"]
    assert not found["select"]["warnings"]


def test_weights_travel_three_times_a_step(run: RunConfig, found: dict[str, dict[str, Any]]) -> None:
    shapes = shapes_of(run)
    kernels = sum(math.prod(leaf.shape) for leaf in shapes.kernels.values()) / run.mesh.tensor
    positions = math.prod(shapes.params["embed"]["position"]["embedding"].shape)
    others = (run.mesh.fsdp - 1) / run.mesh.fsdp
    wire = found["train_step"]["wire_bytes_by_kind"]
    # float32 weights and the bits of their masks twice, positions once; of the table of words, rows alone.
    assert wire["all-gather"] == pytest.approx(others * (2 * 5 * kernels + 4 * positions), rel=0.02)
    assert wire["reduce-scatter"] == pytest.approx(others * 4 * (kernels + positions), rel=0.02)
    rows = BATCH / run.mesh.fsdp * LENGTH * SHAPE["hidden_size"]
    assert wire["all-to-all"] == pytest.approx(2 * others * 4 * rows, rel=0.02)


@pytest.mark.parametrize("name", SCALED)
def test_shardings_are_those_on_record(name: str) -> None:
    """Written by: python launch/plan.py --config=… --json=FILE, whose key 'shardings' goes to the file by hand."""
    shapes = shapes_of(scaled(name))
    assert programs.describe_shardings(shapes) == json.loads(GOLDEN.read_text())[name]
    assert not programs.left_whole(shapes)
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes.state))
    split = math.prod(dataclasses.asdict(shapes.run.mesh).values())
    assert programs.bytes_of(shapes.state) < 1.1 * whole / split, "each chip has its share of the state"


def test_a_large_leaf_that_lies_whole_is_named(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "LARGE", 10)
    monkeypatch.setattr(sharding, "RULES", ((r"ffn_in/kernel$", jax.P()), *sharding.RULES))
    whole = programs.left_whole(shapes_of(run))
    assert "params/layers/ffn_in/kernel" in whole and "params/layers/ffn_out/kernel" not in whole


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "there is no 'v9'; expected one of v4, v5e"),
        ("v5p:64", "a topology of v5p has 3 dimensions, such as v5p:2x2x1"),
        ("v5e:4xx4", "expected the chips along each dimension, such as v5e:4x4"),
        ("h100", "expected the chips along each dimension, such as h100:8"),
    ],
)
def test_topologies_that_there_are_not(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accelerators.parse_topology(name)


@pytest.mark.parametrize(
    ("mesh", "batch_size", "message"),
    [
        ({"fsdp": 4}, 8, "config.mesh is .*fsdp 4.*; expected a product of 8, the devices of cpu:8"),
        ({"fsdp": 8}, 12, "config.training.batch_size is 12; expected a multiple of 8"),
        ({"fsdp": 2, "tensor": 4}, 8, "the mesh does not fit the model"),
    ],
)
def test_meshes_that_do_not_fit(run: RunConfig, mesh: dict[str, int], batch_size: int, message: str) -> None:
    training = dataclasses.replace(run.training, batch_size=batch_size)
    wrong = dataclasses.replace(run, mesh=MeshConfig(**mesh), training=training)
    if "tensor" in mesh:
        # Three concepts do not divide over two devices.
        data = dataclasses.replace(run.data, concepts=("food", "noise", "service"))
        wrong = dataclasses.replace(wrong, mesh=MeshConfig(fsdp=4, concept=2), data=data)
    with pytest.raises(ValueError, match=message):
        plan.measure(wrong, CPUS, "train_step")


def test_unknown_backbones_and_classes_are_named(run: RunConfig) -> None:
    unknown = dataclasses.replace(run, backbone=dataclasses.replace(run.backbone, name="facebook/opt-65b"))
    with pytest.raises(ValueError, match=r"'facebook/opt-65b' is not known here; expected one of .*facebook/opt-66b"):
        programs.model_config(unknown)
    columns = {"preset": "columns", "text_column": "t", "label_column": "l", "concept_columns": ("a",), "concepts": ()}
    with pytest.raises(ValueError, match=r"name config.data.classes and config.data.labels"):
        programs.model_config(dataclasses.replace(run, data=dataclasses.replace(run.data, **columns)))


@pytest.mark.parametrize(
    ("size", "billions"),
    [("125m", 0.125), ("350m", 0.331), ("1.3b", 1.316), ("6.7b", 6.66), ("30b", 30.0), ("66b", 65.7)],
)
def test_published_shapes_have_the_published_size(size: str, billions: float) -> None:
    config = backbones.published_config(f"facebook/opt-{size}")
    params = jax.eval_shape(lambda key: backbones.init_params(key, config), jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_mesh_is_proposed_that_fits() -> None:
    run = scaled("cebab_opt:66b")
    best, *_ = plan.propose_meshes(run, accelerators.parse_topology("v5p:4x4x4"))
    assert best.fsdp * best.tensor * best.concept == 64 and best.tensor > 1 and best.data == 1
    small, *_ = plan.propose_meshes(scaled("cebab_opt:125m"), accelerators.parse_topology("v5e:2x2"))
    assert small.tensor == 1


def test_what_to_turn_is_said(run: RunConfig) -> None:
    tight = accelerators.ACCELERATORS["cpu"]._replace(memory_bytes=1e5)
    bare = dataclasses.replace(run, backbone=dataclasses.replace(run.backbone, remat="none"))
    said = plan.advice("train_step", bare, tight, 3e5)
    assert "config.backbone.remat" in said[0] and "bfloat16" in said[1] and said[-1].startswith("3.0 times the chips")
    assert "training.batch_size below 8, down to 4" in " ".join(said)


def test_the_main_refuses_in_one_line(tmp_path: Path) -> None:
    result = run_main("plan.py", "--config=configs/cebab_opt.py:66b", "--topology=v5p:2x2x2", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: config.mesh is data 1 x fsdp 16 x tensor 4 x concept 1; expected a product")
    assert result.stderr.count("\n") == 1


def test_memory_that_a_compiler_misses_is_read_off_its_message() -> None:
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.17G of 15.75G hbm. Exceeded by 1.42G."
    assert plan.memory_wanted(RuntimeError(said)) == pytest.approx(17.17 * 2**30)
    assert plan.memory_wanted(RuntimeError("RESOURCE_EXHAUSTED: something else")) is None


def test_the_main_prints_a_table_and_writes_json(run: RunConfig, tmp_path: Path) -> None:
    arguments = [f"--config.{key}={value}" for key, value in (("backbone.name", run.backbone.name), ("mesh.fsdp", 2))]
    arguments += ["--config.data.max_length=32", "--programs=eval_step", "--json=plan.json"]
    result = run_main("plan.py", "--config=configs/cebab.py:tiny", "--topology=h100:2", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "(estimates: compiled for virtual CPU devices)" in result.stdout
    report = json.loads((tmp_path / "plan.json").read_text())
    assert report["is_estimate"] and set(report["programs"]) == {"eval_step"}
    step = report["programs"]["eval_step"]
    assert {"peak_bytes_per_chip", "wire_bytes_per_chip", "flops_ratio"} <= set(step)
    row = next(line for line in result.stdout.splitlines() if line.startswith("eval_step"))
    assert f"{step['peak_bytes_per_chip'] / 1e9:.2f}" in row


@needs_libtpu
def test_a_tiny_program_compiles_for_a_tpu(run: RunConfig, tmp_path: Path) -> None:
    arguments = [f"--config.{key}={value}" for key, value in (("backbone.name", run.backbone.name), ("mesh.fsdp", 4))]
    arguments += ["--config.data.max_length=32", "--programs=eval_step", "--json=plan.json"]
    result = run_main("plan.py", "--config=configs/cebab.py:tiny", "--topology=v5e:2x2", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "plan.json").read_text())
    step = report["programs"]["eval_step"]
    assert step["fits"] and not report["is_estimate"]
    assert step["flops_ratio"] == pytest.approx(1, rel=0.05)
    assert step["wire_bytes_by_kind"]["all-gather"] > 0


@needs_libtpu
def test_kernels_that_no_layer_stacks_are_selected_from_on_a_tpu() -> None:
    """OPT-350M's projections; in a process of its own, since the compiler ended it."""
    program = """
import jax
from sparsecbm_jax.core import masks
from sparsecbm_jax.planning import plan
from sparsecbm_jax.runtime import accelerators
device, = plan.devices_of(accelerators.parse_topology("v5e:1x1"))
place = jax.sharding.SingleDeviceSharding(device)
scores, mask = ({"w": jax.ShapeDtypeStruct((1024, 512), dtype, sharding=place)} for dtype in ("float32", "bool"))
jax.jit(lambda scores, mask: masks.drop_and_grow(mask, scores, scores, 1000)).lower(scores, mask).compile()
"""
    # That compiler ends at flags for CPUs.
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    ended = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
