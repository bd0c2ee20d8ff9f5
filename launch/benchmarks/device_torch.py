"""The training step of `benchmarks/device.py` in PyTorch: K masked passes of an OPT over shared float32 weights.

Written for speed, from the formulas. A layer is compiled once, with all of its K passes inside: weights are masked by
packed bits and rounded to bfloat16 in one fused kernel, and the gradients of the K passes are masked and summed in
float32 in another. Autocast would cast the same products at the same places, in kernels of its own. Query, key and
value are one product, attention is the causal `scaled_dot_product_attention` (padding, which comes last, is not seen
by tokens), Adam is fused. Activations are stored where they fit, else layers are computed again in the backward pass.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sparsecbm_jax.config.run_config import OptimConfig
from sparsecbm_jax.data.batches import Batch
from sparsecbm_jax.model.config import CBMConfig

Leaves = Mapping[str, torch.Tensor]
_PRODUCTS = ("attention/output", "ffn_in", "ffn_out")
_OF_ATTENTION = ("attention/query", "attention/key", "attention/value")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of the step's computation.

    Attributes:
        is_compiled: True to compile layers and heads by `torch.compile`.
        mode: Its mode, such as 'default' or 'max-autotune-no-cudagraphs'.
        recomputes: True to compute layers again in the backward pass.
        has_dropout: True for the backbone's dropout.
    """

    is_compiled: bool = True
    mode: str = "default"
    recomputes: bool = False
    has_dropout: bool = True


class TorchStep:
    """One training step: K masked passes, pooling, heads, joint loss, backward, norm clipping, Adam with two rates."""

    def __init__(
        self,
        config: CBMConfig,
        leaves: Leaves,
        heads: Leaves,
        packed: Leaves,
        optim: OptimConfig,
        settings: Settings,
    ) -> None:
        """Takes over the leaves.

        Args:
            config: The model; an OPT with its norms first, of at most eight concepts.
            leaves: θ, {our path: float32}, on the device, layers stacked as ours.
            heads: ψ and φ, {'projector/kernel': float32, ...}.
            packed: Bits of the masks, {our path: uint8}.
            optim: Rates and clipping; the schedule is left out.
            settings: Settings of the computation.
        """
        backbone = config.backbone
        if backbone.family != "opt" or not backbone.norm_first or backbone.has_projections or config.num_concepts > 8:
            raise ValueError("the PyTorch step is written for an OPT with its norms first and at most 8 concepts")
        self.config, self.optim, self.settings = config, optim, settings
        self.device, self.dtype = leaves["embed/word/embedding"].device, getattr(torch, config.dtype)
        self.layers = [_layer_of(leaves, i) for i in range(backbone.num_layers)]
        self.bits = [_layer_of(packed, i) for i in range(backbone.num_layers)]
        self.others = {path: leaf.clone() for path, leaf in leaves.items() if not path.startswith("layers/")}
        self.heads = dict(heads)
        trained = [*self.others.values(), *(leaf for layer in self.layers for leaf in layer.values())]
        self.parameters = [leaf.requires_grad_() for leaf in (*trained, *self.heads.values())]
        groups = [
            {"params": trained, "lr": optim.learning_rate},
            {"params": list(self.heads.values()), "lr": optim.head_learning_rate},
        ]
        self.adam = torch.optim.Adam(groups, fused=True)
        self.layer_fn: Callable[..., Any] = self._compiled(self._layer)
        self.loss_fn: Callable[..., Any] = self._compiled(self._loss)

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if not self.settings.is_compiled:
            return function
        return torch.compile(function, dynamic=False, fullgraph=True, mode=self.settings.mode)

    def __call__(self, batch: Sequence[torch.Tensor]) -> torch.Tensor:
        """Runs the step on the tensors of `put`; returns the loss."""
        self.adam.zero_grad(set_to_none=True)
        input_ids, attention_mask, concepts, label = batch
        seen = attention_mask.float()
        positions = attention_mask.cumsum(1) * attention_mask - 1 + self.config.backbone.position_offset
        words = F.embedding(input_ids, self.others["embed/word/embedding"])
        h = (words + F.embedding(positions, self.others["embed/position/embedding"])).to(self.dtype)
        hidden = [h] * self.config.num_concepts
        for weights, bits in zip(self.layers, self.bits, strict=True):
            if self.settings.recomputes:
                hidden = checkpoint(self.layer_fn, hidden, weights, bits, use_reentrant=False)
            else:
                hidden = self.layer_fn(hidden, weights, bits)
        loss = self.loss_fn(hidden, seen, concepts, label)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.optim.clip_norm)
        self.adam.step()
        return loss.detach()

    def put(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Puts a batch on the device."""
        arrays = (batch.input_ids, batch.attention_mask, batch.concepts, batch.label)
        return tuple(torch.from_numpy(np.asarray(array)).long().to(self.device) for array in arrays)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.config.backbone.dropout, training=self.settings.has_dropout)

    def _norm(self, x: torch.Tensor, weights: Leaves, name: str) -> torch.Tensor:
        """Normalises in float32, whatever the type of x."""
        scale, bias = weights[f"{name}/scale"], weights[f"{name}/bias"]
        return F.layer_norm(x.float(), scale.shape, scale, bias, self.config.backbone.layer_norm_eps)

    def _layer(self, hidden: Sequence[torch.Tensor], weights: Leaves, bits: Leaves) -> list[torch.Tensor]:
        """Runs all K passes of a layer."""
        backbone = self.config.backbone
        heads, attention_dropout = backbone.num_heads, backbone.attention_dropout if self.settings.has_dropout else 0.0

        def linear(x: torch.Tensor, name: str, k: int) -> torch.Tensor:
            kernel = torch.where((bits[f"{name}/kernel"] & (1 << k)) != 0, weights[f"{name}/kernel"], 0.0)
            return F.linear(x, kernel.to(self.dtype), weights[f"{name}/bias"].to(self.dtype))

        out = []
        for k, h in enumerate(hidden):
            rows, length, width = h.shape
            mixed = linear(self._norm(h, weights, "attention_norm").to(self.dtype), "attention/qkv", k)
            query, key, value = mixed.view(rows, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind()
            mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=attention_dropout, is_causal=True)
            mixed = mixed.transpose(1, 2).reshape(rows, length, width)
            h = h + self._drop(linear(mixed, "attention/output", k))
            inner = linear(self._norm(h, weights, "ffn_norm").to(self.dtype), "ffn_in", k)
            out.append(h + self._drop(linear(F.relu(inner), "ffn_out", k)))
        return out

    def _loss(
        self, hidden: Sequence[torch.Tensor], seen: torch.Tensor, concepts: torch.Tensor, label: torch.Tensor
    ) -> torch.Tensor:
        """Computes L_joint = CE(y, label) + γ · mean_k CE(u_k, c_k)."""
        finished = [self._norm(h, self.others, "finish/norm") for h in hidden]
        pooled = [torch.einsum("btd,bt->bd", h, seen) / seen.sum(1, keepdim=True) for h in finished]
        u = torch.einsum("bkd,kdc->bkc", torch.stack(pooled, 1), self.heads["projector/kernel"])
        u = u + self.heads["projector/bias"]
        y = torch.einsum("bkc,kcy->by", (u - u.mean(dim=-1, keepdim=True)) / 10, self.heads["predictor/kernel"])
        task = F.cross_entropy(y + self.heads["predictor/bias"], label, ignore_index=-1)
        return task + self.config.gamma * F.cross_entropy(u.flatten(0, 1), concepts.flatten(), ignore_index=-1)


def _layer_of(leaves: Leaves, index: int) -> dict[str, torch.Tensor]:
    """Returns one layer's leaves, kernels transposed to (out, in), those of query, key and value in one."""
    own: dict[str, torch.Tensor] = {}
    for path, leaf in leaves.items():
        if path.startswith("layers/"):
            one = leaf[index].T if path.endswith("kernel") else leaf[index]
            own[path.removeprefix("layers/")] = one.clone(memory_format=torch.contiguous_format)
    for kind in ("kernel", "bias"):
        parts = [own.pop(f"{name}/{kind}") for name in _OF_ATTENTION if f"{name}/{kind}" in own]
        if parts:
            own[f"attention/qkv/{kind}"] = torch.cat(parts)
    return own


def random_step(
    config: CBMConfig,
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    density: float,
    optim: OptimConfig,
    how: Settings,
) -> TorchStep:
    """Makes a step from random weights and masks on the device.

    Args:
        config: See `TorchStep`.
        shapes: {'params', 'heads' and 'packed': {path: shape}}.
        density: Share of the weights that each mask keeps.
        optim: See `TorchStep`.
        how: Settings of the computation.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def random(path: str, shape: tuple[int, ...]) -> torch.Tensor:
        if path.endswith(("kernel", "embedding")):
            return torch.randn(shape, device=device).mul_(0.02)
        return torch.full(shape, 1.0 if path.endswith("scale") else 0.0, device=device)

    def random_bits(shape: tuple[int, ...]) -> torch.Tensor:
        bits = torch.zeros(shape, dtype=torch.uint8, device=device)
        for layer in bits:
            for k in range(config.num_concepts):
                layer |= (torch.rand(layer.shape, device=device) < density).to(torch.uint8) << k
        return bits

    torch.manual_seed(0)
    leaves, heads = (
        {path: random(path, shape) for path, shape in shapes[name].items()} for name in ("params", "heads")
    )
    packed = {path: random_bits(shape) for path, shape in shapes["packed"].items()}
    return TorchStep(config, leaves, heads, packed, optim, how)


def time_steps(
    make: Callable[[Settings], TorchStep], batches: Sequence[Batch], settings: Sequence[Settings], *, num_rounds: int
) -> dict[str, Any]:
    """Times the steps of several settings, of which the fastest counts.

    Args:
        make: Makes a step.
        batches: Batches of a round.
        settings: Settings; each is tried without computing layers again, and with it where memory does not suffice.
        num_rounds: Number of timed rounds, after two steps that warm up.

    Returns:
        The fastest settings' seconds a step, by round, and those of all settings.
    """
    tried = []
    for requested in settings:
        for how in (requested, dataclasses.replace(requested, recomputes=True)):
            try:
                found = _time_one(make, batches, how, num_rounds)
            except torch.OutOfMemoryError as error:
                _say(f"step: torch with {how}: {str(error).splitlines()[0][:120]}")
                found = None
            torch._dynamo.reset()
            if found is not None:
                tried.append(found)
                break
            # The memory of a failed step is freed with its traceback.
            torch.cuda.empty_cache()
    if not tried:
        raise RuntimeError("PyTorch finds too little memory for any of its settings")
    return min(tried, key=lambda one: one["median_seconds"]) | {"tried": tried}


def _time_one(
    make: Callable[[Settings], TorchStep], batches: Sequence[Batch], how: Settings, num_rounds: int
) -> dict[str, Any]:
    is_cuda = torch.cuda.is_available()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    step = make(how)
    put = [step.put(batch) for batch in batches]

    def wait() -> None:
        if is_cuda:
            torch.cuda.synchronize()

    start = time.perf_counter()
    for _ in range(2):
        loss = step(put[0])
    wait()
    warm_up, seconds = time.perf_counter() - start, []
    for _ in range(num_rounds):
        start = time.perf_counter()
        for batch in put:
            loss = step(batch)
        wait()
        seconds.append((time.perf_counter() - start) / len(put))
    peak = torch.cuda.max_memory_allocated() if is_cuda else None
    median = statistics.median(seconds)
    shown = "" if peak is None else f"; peak memory {peak / 1e9:.2f} GB"
    _say(
        f"step: torch {median:.4f} s (median of {num_rounds} rounds; {min(seconds):.4f} to {max(seconds):.4f}) with "
        f"{how}; two steps to warm up took {warm_up:.1f} s{shown}; loss {float(loss):.3f}"
    )
    return {
        "settings": dataclasses.asdict(how),
        "torch": torch.__version__,
        "warm_up_seconds": warm_up,
        "seconds": seconds,
        "median_seconds": median,
        "peak_bytes": peak,
    }


def _say(text: str) -> None:
    print(text, flush=True)
