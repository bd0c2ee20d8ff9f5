"""New places of the modules and names of version 0.1.0, for the errors that old imports raise.

Nothing is imported by its old name: two names for one thing would stay for ever.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

ROOT = __name__.partition(".")[0]

# Modules of 0.1.0, below the package.
MODULES = {
    "app.desk": "app.session",
    "app.forms": "app.schemas",
    "app.gate": "app.security",
    "arms": "intervention.editors",
    "artifact": "model.saved_model",
    "attribution": "explanation.attribution",
    "backbones.encoder": "backbones.layers",
    "backbones.names": "backbones.tensor_names",
    "backbones.published": "backbones.published_shapes",
    "backbones.readers": "backbones.checkpoint_readers",
    "backbones.weights": "backbones.pretrained",
    "blockwise": "pruning.woodfisher_scores",
    "cbm": "model.forward",
    "checkpoint": "runtime.checkpoints",
    "chips": "runtime.accelerators",
    "cholesky": "pruning.cholesky",
    "config": "config.run_config",
    "correction": "correction.corrections",
    "criteria": "pruning.criteria",
    "cutting": "pruning.masks_from_scores",
    "data.files": "data.table_files",
    "data.lexicon": "data.synthetic.lexicon",
    "data.sample": "data.synthetic.reviews",
    "edit_log": "intervention.edit_log",
    "edits": "intervention.stored_edit",
    "evaluation": "evaluation.scores",
    "explanation": "explanation.pathways",
    "finishing": "training.final_model",
    "fisher": "pruning.fisher",
    "guards": "intervention.edit_costs",
    "hlo": "planning.compiled_cost",
    "host_memory": "runtime.memory",
    "impact": "correction.preview",
    "intervention": "intervention.fixed_size_edit",
    "intervention_suite": "evaluation.editing.suite",
    "json_schema": "runtime.json_schema",
    "keeping": "correction.request_file",
    "lasting": "intervention.continual_edit",
    "logs": "training.metrics_log",
    "masks": "core.masks",
    "metrics": "evaluation.metrics",
    "minimal": "intervention.minimal_edit",
    "model_card": "model.card",
    "named_arms": "evaluation.editing.named_editors",
    "patterns": "pruning.patterns",
    "planning": "planning.plan",
    "preparation": "training.setup",
    "programs": "planning.programs",
    "pruning": "pruning.pruner",
    "rendering": "explanation.as_text",
    "report.files": "runtime.json_files",
    "report.gallery": "report.sections.decisions",
    "report.gathering": "report.gather",
    "report.intervention": "report.sections.intervention",
    "report.run": "report.sections.training",
    "report.scores": "report.sections.scores",
    "report.sections": "report.elements",
    "report.subnetworks": "report.sections.subnetworks",
    "report.sweep": "report.sections.sweep",
    "selection": "core.selection",
    "sharding": "core.sharding",
    "steps": "training.train_step",
    "stopping": "runtime.preemption",
    "streams": "evaluation.editing.sequential",
    "subnetworks": "explanation.subnetworks",
    "throughput": "training.throughput",
    "traces": "training.profiling",
    "training": "training.run",
    "vocabulary": "training.vocabulary",
    "woodfisher": "pruning.woodfisher",
}
# Public names whose module is another than their module's in `MODULES`, or that are called otherwise.
NAMES = {
    "app.desk.Desk": "app.session.Session",
    "app.desk.Lasting": "app.session.Session",
    "app.desk.State": "app.session.SessionState",
    "app.forms.Refusal": "app.schemas.ApiError",
    "app.forms.SampleImpact": "app.schemas.SampleEffect",
    "app.forms.read_form": "app.schemas.read_request",
    "app.gate.Gate": "app.security.Guard",
    "app.gate.refuse": "app.security.error_response",
    "arms.Arm": "intervention.editors.Editor",
    "arms.Outcome": "evaluation.editing.subject.Outcome",
    "arms.State": "model.sparse_cbm.ModelArrays",
    "arms.fine_tune": "evaluation.editing.baselines.fine_tune",
    "arms.fixed_share": "intervention.editors.fixed_size",
    "arms.lasting": "intervention.editors.continual",
    "arms.projector_sgd": "evaluation.editing.baselines.projector_sgd",
    "arms.random_share": "evaluation.editing.baselines.random_share",
    "arms.rehearsed": "intervention.editors.Rehearsed",
    "arms.wrong_label": "evaluation.editing.baselines.wrong_label",
    "artifact.MAX_LENGTH": "model.sparse_cbm.MAX_LENGTH",
    "artifact.Predictions": "model.predictions.Predictions",
    "artifact.SparseCBM": "model.sparse_cbm.SparseCBM",
    "artifact.check_texts": "model.predictions.check_texts",
    "artifact.predict": "model.predictions.predict",
    "artifact.text_batches": "model.predictions.text_batches",
    "backbones.encoder.EncoderEmbed": "backbones.bert.EncoderEmbed",
    "backbones.encoder.EncoderFinish": "backbones.bert.EncoderFinish",
    "backbones.readers.read_json": "runtime.json_files.read_json_object",
    "blockwise.Report": "pruning.woodfisher_scores.ScoreReport",
    "cbm.CBMConfig": "model.config.CBMConfig",
    "cbm.CBMOutput": "model.config.CBMOutput",
    "cbm.Heads": "model.config.Heads",
    "cbm.Kernels": "model.config.Kernels",
    "cbm.LossFn": "model.losses.LossFn",
    "cbm.REMAT_POLICIES": "model.config.REMAT_POLICIES",
    "cbm.concept_loss": "model.losses.concept_loss",
    "cbm.effective_kernels": "core.masks.kernels_of",
    "cbm.encode": "model.encode.encode",
    "cbm.init_heads": "model.heads.init_heads",
    "cbm.joint_loss": "model.losses.joint_loss",
    "cbm.make_loss": "model.losses.make_loss",
    "cbm.pool": "model.encode.pool",
    "cbm.predict_label": "model.heads.predict_label",
    "cbm.project": "model.heads.project",
    "cbm.subnetwork_loss": "model.losses.subnetwork_loss",
    "cbm.task_loss": "model.losses.task_loss",
    "cbm.weighted_mean": "model.losses.weighted_mean",
    "checkpoint.RUN_FILE": "runtime.run_directory.RUN_FILE",
    "checkpoint.RunMismatchError": "runtime.run_directory.RunMismatchError",
    "checkpoint.check_same_run": "runtime.run_directory.check_same_run",
    "checkpoint.read_run": "runtime.run_directory.read_run",
    "checkpoint.run_differences": "runtime.run_directory.run_differences",
    "checkpoint.write_atomically": "runtime.json_files.write_atomically",
    "chips.CHIPS": "runtime.accelerators.ACCELERATORS",
    "chips.Chip": "runtime.accelerators.Accelerator",
    "chips.chip_of_kind": "runtime.accelerators.accelerator_of_kind",
    "config.Check": "config.validation.Check",
    "config.FRACTION": "config.validation.FRACTION",
    "config.FRACTIONS": "config.validation.FRACTIONS",
    "config.NON_EMPTY": "config.validation.NON_EMPTY",
    "config.NON_NEGATIVE": "config.validation.NON_NEGATIVE",
    "config.NON_NEGATIVE_INT": "config.validation.NON_NEGATIVE_INT",
    "config.POSITIVE": "config.validation.POSITIVE",
    "config.POSITIVE_INT": "config.validation.POSITIVE_INT",
    "config.nearest_name": "config.names.nearest_name",
    "config.one_of": "config.validation.one_of",
    "config.setting": "config.validation.setting",
    "correction.CorrectionReport": "correction.report.CorrectionReport",
    "correction.Proposal": "explanation.uncertainty.UnsurePrediction",
    "correction.TextPrediction": "correction.report.TextPrediction",
    "correction.correct_lastingly": "correction.correct with editor=intervention.editors.continual(...)",
    "correction.correct_minimally": "correction.correct with editor=intervention.editors.minimal()",
    "correction.name_index": "config.names.name_index",
    "correction.propose": "explanation.uncertainty.unsure_predictions",
    "correction.remember": "intervention.replay.Replay.add",
    "data.schema.did_you_mean": "config.names.did_you_mean",
    "edits.MaskEdit": "intervention.mask_edit.MaskEdit",
    "edits.apply": "intervention.mask_edit.apply",
    "edits.is_traced": "intervention.mask_edit.is_traced",
    "edits.num_changed": "intervention.mask_edit.num_changed",
    "edits.undo": "intervention.mask_edit.undo",
    "evaluation.METRICS_FILE": "evaluation.run_summary.METRICS_FILE",
    "evaluation.read_metrics": "evaluation.run_summary.read_metrics",
    "evaluation.render_summary": "evaluation.run_summary.render_summary",
    "evaluation.render_table": "evaluation.tables.render_table",
    "evaluation.sections_of": "evaluation.tables.sections_of",
    "evaluation.summarise_runs": "evaluation.run_summary.summarise_runs",
    "finishing.kept_model": "training.final_model.final_model",
    "fisher.Kernels": "pruning.gradients.Kernels",
    "fisher.SubnetworkGradients": "pruning.gradients.SubnetworkGradients",
    "fisher.subnetwork_gradient": "pruning.gradients.subnetwork_gradient",
    "guards.concept_output": "model.forward.concept_output",
    "guards.fisher_guard": "intervention.edit_costs.fisher_costs",
    "guards.steep": "intervention.edit_costs.sharpen",
    "impact.Impact": "correction.preview.SampleEffect",
    "impact.readings": "correction.preview.outputs_of",
    "intervention.Guard": "intervention.ranking.EditCosts",
    "intervention.OracleOutput": "evaluation.editing.baselines.OracleOutput",
    "intervention.SALIENCIES": "intervention.ranking.SALIENCIES",
    "intervention.SaliencyFn": "intervention.ranking.SaliencyFn",
    "intervention.check_index": "intervention.mask_edit.check_index",
    "intervention.check_masks": "core.masks.check_masks",
    "intervention.edit_between": "intervention.mask_edit.edit_between",
    "intervention.edit_of": "intervention.mask_edit.edit_of",
    "intervention.find_saliency": "intervention.ranking.find_saliency",
    "intervention.guarded": "intervention.ranking.cost_aware",
    "intervention.magnitude": "intervention.ranking.magnitude",
    "intervention.oracle_activations": "evaluation.editing.baselines.oracle_activations",
    "intervention.signed": "intervention.ranking.signed",
    "intervention.spare": "intervention.ranking.project_out",
    "intervention_suite.Subject": "evaluation.editing.subject.Subject",
    "intervention_suite.undone": "evaluation.editing.suite.single_edits",
    "keeping.Case": "correction.request_file.CorrectionRequest",
    "keeping.CaseFile": "correction.request_file.RequestFile",
    "keeping.Keeper": "intervention.editors.Continual",
    "lasting.LastingEdit": "intervention.continual_edit.ContinualEdit",
    "lasting.MARGIN": "intervention.continual_edit.ContinualSettings",
    "lasting.MAX_ROUNDS": "intervention.continual_edit.ContinualSettings",
    "lasting.Replay": "intervention.replay.Replay",
    "lasting.STRENGTH": "intervention.continual_edit.ContinualSettings",
    "lasting.concept_logits": "model.forward.concept_logits",
    "lasting.lasting_edit": "intervention.continual_edit.continual_edit",
    "logs.StepTrace": "training.profiling.StepTrace",
    "logs.progress": "runtime.progress.progress",
    "masks.Params": "core.trees.Params",
    "masks.leaf_at": "core.trees.leaf_at",
    "masks.with_leaf": "core.trees.with_leaf",
    "minimal.Ranked": "intervention.ranking.Ranked",
    "minimal.least_margin": "model.losses.least_margin",
    "minimal.margins": "model.losses.margins",
    "minimal.positions_of_true": "intervention.ranking.positions_of_true",
    "minimal.ranked": "intervention.ranking.ranked",
    "minimal.ranked_swaps": "intervention.ranking.ranked_swaps",
    "minimal.swapped": "intervention.ranking.swapped",
    "minimal.swapped_mask": "intervention.ranking.swapped_mask",
    "named_arms.ARMS": "evaluation.editing.named_editors.EDITORS",
    "named_arms.Kit": "evaluation.editing.named_editors.EditorContext",
    "named_arms.NAMED": "evaluation.editing.named_editors.NAMED_EDITORS",
    "named_arms.NamedArm": "evaluation.editing.named_editors.NamedEditor",
    "pruning.PruningEvent": "pruning.schedule.PruningEvent",
    "pruning.ScoreStore": "pruning.score_store.ScoreStore",
    "pruning.StoredScores": "pruning.score_store.StoredScores",
    "pruning.default_sparsity": "pruning.schedule.default_sparsity",
    "pruning.final_sparsity": "pruning.schedule.final_sparsity",
    "pruning.fisher_batches": "data.batches.fisher_batches",
    "pruning.num_fisher_batches": "data.batches.num_fisher_batches",
    "pruning.peak_memory": "runtime.memory.peak_memory",
    "pruning.schedule": "pruning.schedule.schedule",
    "pruning.whole_masks": "model.sparse_cbm.whole_masks",
    "rendering.render_correction": "correction.report.render_correction",
    "report.intervention.Report": "report.sections.intervention.SuiteReport",
    "sharding.path_string": "core.trees.path_string",
    "steps.fit_predictor": "training.label_predictor.fit_predictor",
    "streams.Cell": "evaluation.editing.subject.Cell",
    "streams.Readings": "evaluation.editing.subject.SplitPredictions",
    "streams.StreamReport": "evaluation.editing.sequential.SequentialReport",
    "streams.read": "evaluation.editing.subject.predict_split",
    "streams.run_stream": "evaluation.editing.sequential.run_sequence",
    "subnetworks.EditChange": "correction.edit_view.EditChange",
    "subnetworks.KernelChange": "correction.edit_view.KernelChange",
    "subnetworks.view_edit": "correction.edit_view.view_edit",
    "training.LOSSES": "model.strategies.STRATEGIES",
    "training.NonFiniteError": "training.loop.NonFiniteError",
}

# Names that are gone: nothing but tests used them.
REMOVED = frozenset(
    "evaluation.majority_baseline report.intervention.DENSE training.Pending woodfisher.from_blocks "
    "woodfisher.dual_inverse woodfisher.qr_inverse woodfisher.group_score woodfisher.optimal_update".split()
)


def hint(name: str) -> str:
    """Returns where a module or name of 0.1.0 is now, as the end of a sentence; empty where it is unknown.

    >>> hint("cbm.forward")
    '; since version 0.2.0 it is sparsecbm_jax.model.forward.forward'
    >>> hint("nothing")
    ''
    """
    if name in REMOVED:
        return "; it was removed in version 0.2.0"
    module, _, attribute = name.rpartition(".")
    new = NAMES.get(name) or MODULES.get(name)
    if new is None and module in MODULES and not MODULES[module].startswith(f"{module}."):
        new = f"{MODULES[module]}.{attribute}"
    return f"; since version 0.2.0 it is {ROOT}.{new}" if new else ""


def raise_for(package: str) -> Callable[[str], NoReturn]:
    """Returns a package's `__getattr__`, where a module of 0.1.0 had the package's name."""

    def missing(name: str) -> Any:
        known = hint(f"{package.partition('.')[2]}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}{known}")

    return missing


class _MovedModules(importlib.abc.MetaPathFinder):
    """A finder that is asked after all others, so only for modules that are not there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        root, _, name = fullname.partition(".")
        known = hint(name) if root == ROOT else ""
        if known:
            # With its `name` set, `from PACKAGE import NAME` would put a message of its own in place of this one.
            raise ImportError(f"there is no {fullname}{known}")
        return None


def explain_missing_modules() -> None:
    """Makes the import of a module of 0.1.0 that moved raise an error that says where it is."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
