"""Scores and masks on eight devices are those of one, and no device gets another's Fisher blocks."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from sparsecbm_jax.config.run_config import PrunerConfig
from sparsecbm_jax.core import sharding
from sparsecbm_jax.pruning import fisher
from sparsecbm_jax.pruning.woodfisher_scores import _move, score_grams, score_rows, woodfisher_scores

pytestmark = pytest.mark.well_compiled

MESHES = {
    "fsdp 8": {"fsdp": 8},
    "fsdp 2 x tensor 4": {"fsdp": 2, "tensor": 4},
}
SHAPES = {"layers/ffn_in/kernel": (2, 16, 64), "layers/ffn_out/kernel": (2, 64, 16), "embed/project_in/kernel": (8, 20)}
SCORE_TOLERANCE = 1e-5
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def random_tree(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()}


def placed(tree: dict[str, jax.Array], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    return {
        path: jax.device_put(leaf, NamedSharding(mesh, sharding.spec_for(path, leaf.ndim)))
        for path, leaf in tree.items()
    }


@pytest.mark.parametrize(
    ("name", "is_at_once"),
    [("fsdp 8", True), ("fsdp 2 x tensor 4", False)],
    ids=["fsdp", "tensor, piece by piece"],
)
@pytest.mark.parametrize("num_grads", [5, 20], ids=["dual", "gram"])
def test_scores_on_a_mesh_are_those_of_one_device(name: str, num_grads: int, is_at_once: bool) -> None:
    mesh = sharding.make_mesh(**MESHES[name])
    kernels, gradients = random_tree(0), [random_tree(seed) for seed in range(1, num_grads + 1)]
    # Units that float32 does badly with, too.
    gradients = [
        {path: leaf.at[..., 3].multiply(1e3 * gradients[0][path][..., 3]) for path, leaf in g.items()}
        for g in gradients
    ]
    config = PrunerConfig(block_size=12, num_grads=num_grads)
    expected = woodfisher_scores(kernels, gradients, config=config)
    there: dict[str, Any] = {}
    on_mesh, streamed = placed(kernels, mesh), [placed(gradient, mesh) for gradient in gradients]
    memory = None if is_at_once else round(8 / 7 * (fisher._whole_bytes(on_mesh) + 12_000))
    config = dataclasses.replace(config, fisher_memory=memory)
    got = woodfisher_scores(on_mesh, streamed, config=config, report=there)
    assert (there["passes"] == 1) == is_at_once
    for path, leaf in got.items():
        np.testing.assert_allclose(leaf, expected[path], rtol=SCORE_TOLERANCE)
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, sharding.spec_for(path, leaf.ndim)), leaf.ndim)


def test_a_plan_is_for_one_device() -> None:
    kernels = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in random_tree(0).items()}
    config = PrunerConfig(block_size=4, num_grads=20, fisher_memory=172_000)
    mesh = sharding.make_mesh(fsdp=8)
    assert len(fisher.plan_passes(kernels, config)) > 1
    assert len(fisher.plan_passes(placed(random_tree(0), mesh), config)) == 1
    assert "MiB a device (of 0 MiB allowed)" in fisher.describe_plan(placed(random_tree(0), mesh), config)


def test_no_device_gets_anothers_fisher_blocks() -> None:
    mesh = sharding.make_mesh(fsdp=8)

    def units(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, sharding.UNITS_SPEC))

    kernel, grams, scalar = units(16, 24), units(2, 24, 8, 8), jnp.float32(1)
    cuts = [kernel] * 3
    programs = {
        "add": fisher._add.lower(grams, cuts, mesh),
        "empty": fisher._no_gram.lower(kernel, 8, mesh),
        "gram": score_grams.lower(kernel, grams, scalar, scalar, 8, "1", mesh),
        "dual": score_rows.lower(kernel, cuts, scalar, 8, "1", mesh),
        "move": _move.lower(kernel, units(16, 24, dtype=bool), grams, scalar, scalar, 8, mesh),
    }
    for name, program in programs.items():
        compiled = program.compile()
        assert not re.search(COLLECTIVES, compiled.as_text()), name
        outputs = jax.tree.leaves(compiled.output_shardings)
        assert all(out.is_equivalent_to(NamedSharding(mesh, sharding.UNITS_SPEC), 4) for out in outputs), name
