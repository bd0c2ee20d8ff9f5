"""The step of `training_step.py` in PyTorch: the same step at its fastest settings, and by the authors' method.

Written from the formulas, on `transformers.BertModel`; the authors' code is only emulated where it costs time: every
text padded to 512 tokens, one whole pass of the model for each concept, the mean over padding too.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from sparsecbm_jax.backbones import config_to_hf
from sparsecbm_jax.backbones.tensor_names import tensor_names
from sparsecbm_jax.config.run_config import OptimConfig
from sparsecbm_jax.core.masks import Masks
from sparsecbm_jax.core.trees import Params, leaf_at
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.model.config import CBMConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that may change the speed of a step; only `pooling` changes its result.

    Attributes:
        attention: 'sdpa' or 'eager'.
        masking: 'where' with boolean masks, or 'multiply' with masks in float32.
        embedding: 'once' for all concepts, as ours, or 'each'.
        optimizer: Adam's implementation: 'fused', 'foreach', or 'default', which torch chooses.
        pooling: 'tokens', or 'all' to count padding in the mean.
        is_compiled: True to compile one concept's encoder by `torch.compile`.
    """

    attention: str = "sdpa"
    masking: str = "where"
    embedding: str = "once"
    optimizer: str = "fused"
    pooling: str = "tokens"
    is_compiled: bool = False


# Tried one after the other, each against the best so far.
ALTERNATIVES = ({"attention": "eager"}, {"masking": "multiply"}, {"embedding": "each"}, {"optimizer": "foreach"})
AUTHORS = Settings(embedding="each", optimizer="default", pooling="all")


def use_cores(num_cores: int) -> None:
    """Makes torch use one thread a core, and flush denormals to zero as XLA does."""
    torch.set_num_threads(num_cores)
    torch.set_flush_denormal(True)


def to_torch(config: CBMConfig, leaves: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Converts {our path: leaf} to {their name: tensor}, layers apart and kernels transposed to (out, in)."""
    tensors = {}
    for tensor in tensor_names(config.backbone):
        if tensor.path not in leaves:
            continue
        leaf = np.asarray(leaves[tensor.path])
        for name, value in zip(tensor.names, leaf if tensor.is_stacked else [leaf], strict=True):
            tensors[name] = torch.from_numpy(np.array(value.T if tensor.is_transposed else value, order="C"))
    return tensors


class TorchStep:
    """One training step: K masked passes, pooling, heads, joint loss, backward, norm clipping, Adam with two rates."""

    def __init__(
        self, config: CBMConfig, params: Params, heads: Mapping[str, Any], masks: Masks, optim: OptimConfig
    ) -> None:
        """Copies everything into PyTorch, in train mode with the backbone's own dropout, at `Settings()`.

        Args:
            config: The model; a BERT.
            params: θ.
            heads: ψ and φ.
            masks: K boolean masks.
            optim: Rates and clipping; the schedule is left out.
        """
        if config.backbone.family != "bert":
            raise ValueError(
                f"the PyTorch step is written for BERT, not for backbone family {config.backbone.family!r}"
            )
        self.config, self.optim = config, optim
        self.bert = transformers.BertModel(
            transformers.BertConfig.from_dict(config_to_hf(config.backbone)), add_pooling_layer=False
        ).train()
        leaves = {tensor.path: leaf_at(params, tensor.path) for tensor in tensor_names(config.backbone)}
        self.bert.load_state_dict(to_torch(config, leaves))
        self.heads = {
            f"{part}/{name}": torch.tensor(np.asarray(leaf), requires_grad=True)
            for part, leaves in heads.items()
            for name, leaf in leaves.items()
        }
        self.masks = [
            to_torch(config, {path: mask[k] for path, mask in masks.items()}) for k in range(config.num_concepts)
        ]
        self.zero = torch.zeros(())
        self.set(Settings())

    def set(self, settings: Settings) -> None:
        """Changes the settings and resets Adam."""
        self.settings = settings
        self.bert.set_attn_implementation(settings.attention)
        self.parameters = [*self.bert.parameters(), *self.heads.values()]
        groups = [
            {"params": list(self.bert.parameters()), "lr": self.optim.learning_rate},
            {"params": list(self.heads.values()), "lr": self.optim.head_learning_rate},
        ]
        fused, foreach = (settings.optimizer == name or None for name in ("fused", "foreach"))
        self.adam = torch.optim.Adam(groups, fused=fused, foreach=foreach)
        self.weight_masks = self.masks
        if settings.masking == "multiply":
            self.weight_masks = [{name: mask.float() for name, mask in masks.items()} for masks in self.masks]
        self.encoder_fn = _compiled(self.bert.encoder) if settings.is_compiled else self._encoder

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Runs the step; returns the loss."""
        self.adam.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.optim.clip_norm)
        self.adam.step()
        return loss.detach()

    def loss(self, batch: Batch) -> torch.Tensor:
        """Computes L_joint = CE(y, label) + γ · mean_k CE(u_k, c_k)."""
        input_ids, attention_mask = torch.from_numpy(batch.input_ids).long(), torch.from_numpy(batch.attention_mask)
        seen = attention_mask.float()
        weight = torch.ones_like(seen) if self.settings.pooling == "all" else seen
        hidden = self._hidden_states(input_ids, attention_mask, seen)
        pooled = torch.stack([torch.einsum("btd,bt->bd", h, weight) for h in hidden], 1)
        z = pooled / weight.sum(1)[:, None, None]
        u = torch.einsum("bkd,kdc->bkc", z, self.heads["projector/kernel"]) + self.heads["projector/bias"]
        y = torch.einsum("bkc,kcy->by", (u - u.mean(dim=-1, keepdim=True)) / 10, self.heads["predictor/kernel"])
        y = y + self.heads["predictor/bias"]
        entropy = functools.partial(torch.nn.functional.cross_entropy, ignore_index=-1)
        concept_loss = entropy(u.flatten(0, 1), torch.from_numpy(batch.concepts).long().flatten())
        return entropy(y, torch.from_numpy(batch.label).long()) + self.config.gamma * concept_loss

    def _hidden_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, seen: torch.Tensor
    ) -> list[torch.Tensor]:
        passes = [self._masked(masks) for masks in self.weight_masks]
        if self.settings.embedding == "each":
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            return [
                torch.func.functional_call(self.bert, weights, kwargs=inputs).last_hidden_state for weights in passes
            ]
        h = self.bert.embeddings(input_ids)
        bias = (1.0 - seen)[:, None, None] * torch.finfo(torch.float32).min
        return [
            self.encoder_fn({name.removeprefix("encoder."): leaf for name, leaf in weights.items()}, h, bias)
            for weights in passes
        ]

    def _masked(self, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights = {name: self.bert.get_parameter(name) for name in masks}
        if self.settings.masking == "multiply":
            return {name: weights[name] * mask for name, mask in masks.items()}
        return {name: torch.where(mask, weights[name], self.zero) for name, mask in masks.items()}

    def _encoder(self, weights: Mapping[str, torch.Tensor], h: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        output = torch.func.functional_call(self.bert.encoder, dict(weights), (h, bias))
        hidden: torch.Tensor = output.last_hidden_state
        return hidden


def _compiled(encoder: torch.nn.Module) -> Any:
    # One program a bucket; the default limit would send the last buckets back to eager execution.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.accumulated_recompile_limit = 1024

    def encode(weights: Mapping[str, torch.Tensor], h: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = torch.func.functional_call(encoder, dict(weights), (h, bias)).last_hidden_state
        return hidden

    return torch.compile(encode, dynamic=False)


def fastest(step: TorchStep, batches: Sequence[Batch], *, try_compile: bool = False, num_repeats: int = 3) -> Settings:
    """Sets the step to the fastest of its settings, found one at a time, and prints the seconds of each.

    Args:
        step: The step.
        batches: Batches that are timed.
        try_compile: True to try `torch.compile`, too, which compiles for minutes.
        num_repeats: Passes over the batches; the fastest counts, so the first may warm up.

    Returns:
        The fastest settings.
    """
    best, best_seconds = Settings(), float("inf")
    changes: list[dict[str, Any]] = [{}, *ALTERNATIVES]
    if try_compile:
        changes.append({"is_compiled": True, "embedding": "once"})
    for change in changes:
        settings = dataclasses.replace(best, **change)
        try:
            step.set(settings)
            seconds = min(_seconds(step, batches) for _ in range(num_repeats))
        except (RuntimeError, NotImplementedError, ValueError) as error:
            print(f"torch cannot do {settings}: {str(error).splitlines()[0]}", flush=True)
            continue
        print(f"torch {seconds:.3f} s a step with {settings}", flush=True)
        if seconds < best_seconds:
            best, best_seconds = settings, seconds
    step.set(best)
    return best


def _seconds(step: TorchStep, batches: Sequence[Batch]) -> float:
    start = time.perf_counter()
    for batch in batches:
        step(batch)
    return (time.perf_counter() - start) / len(batches)
