"""A distilled loss is a share of the distance from the teacher, row by row, and spread over a mesh alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsecbm_jax.backbones import BackboneConfig
from sparsecbm_jax.config.run_config import from_config_dict
from sparsecbm_jax.core import sharding
from sparsecbm_jax.data.batches import Batch, TeacherLogits
from sparsecbm_jax.model.config import CBMOutput
from sparsecbm_jax.model.losses import Distilled, joint_loss, make_loss
from sparsecbm_jax.training.teacher import Teacher, loss_of

from tests.model.test_forward import NUM_LABELS, build, random_batch

WEIGHT, TEMPERATURE = 0.3, 2.0


def taught(batch: Batch, seed: int = 0) -> Batch:
    rng, (rows, k) = np.random.default_rng(seed), batch.concepts.shape
    teacher = TeacherLogits(rng.normal(size=(rows, k, 3)), rng.normal(size=(rows, NUM_LABELS)))
    return batch._replace(teacher=TeacherLogits(*(np.asarray(leaf, np.float32) for leaf in teacher)))


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    p, q = (np.exp(u / TEMPERATURE) / np.exp(u / TEMPERATURE).sum(-1, keepdims=True) for u in (p, q))
    return TEMPERATURE**2 * (p * np.log(p / q)).sum(-1)


def test_the_loss_is_a_share_of_each(tiny_backbone_config: BackboneConfig) -> None:
    config, *_ = build(tiny_backbone_config)
    batch = taught(random_batch()._replace(example_weight=np.array([1, 1, 1, 0], np.float32)))
    # Rows without labels count in the distance.
    batch = batch._replace(label=np.array([-1, 2, 0, 1], np.int32))
    rng = np.random.default_rng(1)
    u, y = rng.normal(size=(4, 3, 3)), rng.normal(size=(4, NUM_LABELS))
    output = CBMOutput(jnp.asarray(u), jnp.asarray(u), jnp.asarray(y), jnp.zeros((4, 1, 2)))
    loss, parts = Distilled(joint_loss, WEIGHT, TEMPERATURE)(config, output, batch)
    assert batch.teacher is not None
    distance = divergence(batch.teacher.label, y)[:3].mean()
    distance += config.gamma * divergence(batch.teacher.concepts, u)[:3].mean()
    hard, _ = joint_loss(config, output, batch)
    assert float(parts["teacher_distance"]) == pytest.approx(distance, rel=1e-4)
    assert float(loss) == pytest.approx((1 - WEIGHT) * float(hard) + WEIGHT * distance, rel=1e-4)
    alone, _ = Distilled(joint_loss, WEIGHT, TEMPERATURE)(config, output, batch._replace(teacher=None))
    assert float(alone) == float(hard)


def test_a_mesh_computes_the_same(tiny_backbone_config: BackboneConfig) -> None:
    config, params, _, heads = build(tiny_backbone_config, k=4)
    batch = taught(random_batch(0, rows=8, k=4))
    loss_fn = Distilled(joint_loss, WEIGHT, TEMPERATURE)
    mesh = sharding.make_mesh(data=2, fsdp=2, concept=2)
    (one, _), (many, _) = (
        jax.jit(make_loss(config, where, loss_fn))(params, heads, None, placed, None)
        for where, placed in ((None, batch), (mesh, sharding.put_batch(batch, mesh)))
    )
    assert float(many) == pytest.approx(float(one), rel=1e-5)


def test_each_row_has_its_own_logits(tmp_path: Path) -> None:
    row_ids = np.array([7, 3, 11])
    concepts = np.arange(3 * 2 * 3, dtype=np.float32).reshape(3, 2, 3)
    teacher = Teacher(row_ids, TeacherLogits(concepts, concepts[:, 0]))
    batch: Any = random_batch(k=2)._replace(row_ids=np.array([11, 7, 3, -1], np.int32))
    teacher.save(tmp_path)
    for one in (teacher, Teacher.load(tmp_path)):
        logits = one.teach(batch).teacher
        assert logits is not None
        np.testing.assert_array_equal(logits.concepts[:3], concepts[[2, 0, 1]])
        np.testing.assert_array_equal(logits.label[:3], concepts[[2, 0, 1], 0])
    with pytest.raises(FileNotFoundError, match=r"teacher\.npz is missing"):
        Teacher.load(tmp_path / "elsewhere")


def test_only_sparse_runs_are_distilled() -> None:
    asked = {"distillation": {"weight": 0.5}}
    assert loss_of(from_config_dict(asked)) == Distilled(joint_loss, 0.5, 2.0)
    assert loss_of(from_config_dict({**asked, "strategy": "joint"})) is joint_loss
    assert loss_of(from_config_dict({})) is joint_loss
    with pytest.raises(ValueError, match=r"distillation\.weight is 2\.0; expected a number in"):
        from_config_dict({"distillation": {"weight": 2.0}})
