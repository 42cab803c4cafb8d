"""Norms and scales on a block's output, before the residual addition, against transformers' layers.

They are planted in the layer spec of a Qwen 3, whose tensors have none. The reference is Gemma 3, whose layers have one
on either side of attention and MLP; for a scale alone it is Granite. A method's adapter comes before both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3ForCausalLM,
)

from tests.dist import ranks
from tests.dist.ranks import run_ranks
from tests.tiny_models import VOCAB, make_tiny

TOLERANCE = 1e-4  # of the largest value, in fp32; found: at most 1.1e-6
BROKEN = 1e-2  # what a negative control must exceed
LAYOUTS = {"tp1": (1, False), "tp2": (2, False), "tp2_sp": (2, True)}
ROWS, LENGTH, HIDDEN = 2, 16, 64


@dataclass(frozen=True)
class Case:
    """The norms and scales of a layer. norms: on outputs; inputs: on inputs too."""

    norms: bool = True
    inputs: bool = True
    scale: float = 1.0
    adapter: bool = False


CASES = {
    "sandwich": Case(),  # gemma3
    "outputs": Case(inputs=False),  # olmo2
    "scale": Case(norms=False, scale=0.22),  # granite
    "adapter": Case(scale=0.22, adapter=True),
}


class Adapter(nn.Module):
    """A fixed function of a position's features, the same on every rank and in the reference."""

    def __init__(self) -> None:
        super().__init__()
        mixing = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1)) / HIDDEN**0.5
        self.register_buffer("mixing", mixing)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(x @ self.mixing)


def referee(folder: Path, case: Case) -> tuple[PreTrainedModel, dict[str, np.ndarray]]:
    """Return transformers' model, saved in `folder` for ours to load, and the weights that ours has no place for."""
    if not case.norms:
        llama = LlamaForCausalLM.from_pretrained(make_tiny("llama", folder))
        keys = {key: value for key, value in llama.config.to_dict().items() if key != "model_type"}
        multipliers = {"residual_multiplier": case.scale, "attention_multiplier": llama.config.head_dim**-0.5}
        granite = GraniteForCausalLM(GraniteConfig(**keys, **multipliers))
        granite.load_state_dict(llama.state_dict())
        return granite, {}
    ours = Qwen3ForCausalLM.from_pretrained(
        make_tiny("qwen3", folder, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    )
    rope = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
    config = Gemma3TextConfig(
        **{key: getattr(ours.config, key) for key in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")},
        **{key: getattr(ours.config, key) for key in ("num_hidden_layers", "num_attention_heads", "rms_norm_eps")},
        num_key_value_heads=ours.config.num_key_value_heads,
        query_pre_attn_scalar=ours.config.head_dim,
        hidden_activation="silu",
        layer_types=["full_attention"] * ours.config.num_hidden_layers,
        rope_parameters=rope,
        tie_word_embeddings=False,
        pad_token_id=None,
    )
    gemma = Gemma3ForCausalLM(config)
    weights, planted = ours.state_dict(), {}
    draws = torch.Generator().manual_seed(2)
    for name, value in gemma.state_dict().items():
        hf = name
        if "post_attention_layernorm" in name or "post_feedforward_layernorm" in name:
            value.uniform_(-0.3, 0.3, generator=draws)
            layer = name.split(".")[2]
            which = "post_self_attn_layernorm" if "attention" in name else "post_mlp_layernorm"
            planted[f"decoder.layers.{layer}.{which}.weight"] = (1 + value).numpy()
            continue
        hf = hf.replace("pre_feedforward_layernorm", "post_attention_layernorm")
        # Gemma's norms multiply by 1 + weight, and its embeddings by √hidden.
        value.copy_(weights[hf] - 1 if "norm" in name else weights[hf])
        if "embed_tokens" in name:
            value.div_(HIDDEN**0.5)
    for layer in gemma.model.layers:
        if not case.inputs:
            layer.input_layernorm = layer.pre_feedforward_layernorm = nn.Identity()
        if case.adapter:
            layer.self_attn.register_forward_hook(lambda _, __, out: (Adapter()(out[0]), *out[1:]))
            layer.mlp.register_forward_hook(lambda _, __, out: Adapter()(out))
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            norm.register_forward_hook(lambda _, __, out: out * case.scale)
    return gemma, planted


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(5))


def expected(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Return the logits, and the gradient of Σ −log p(a token given itself) with respect to every token's embedding."""
    embedding = model.get_input_embeddings()
    logits = model.eval()(tokens(), use_cache=False).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens().flatten(), reduction="sum").backward()
    return {
        "logits": logits.detach().numpy(),
        "gradient": (embedding.weight.grad / getattr(embedding, "scalar_embed_scale", 1.0)).numpy(),
    }


def planted_model(folder: Path, topology: Any, case: Case, planted: dict[str, np.ndarray]) -> Any:
    from megatron.core.transformer.identity_op import IdentityOp

    from lowrank_dist.arch.tensors import copy_plans
    from lowrank_dist.formats.model_folder import open_checkpoint
    from lowrank_dist.model import causal_lm, layers
    from lowrank_dist.model import spec as specs
    from lowrank_dist.model.load import check_model, load_weights

    def spec(*arguments: Any) -> Any:
        block = specs.layer_specs(*arguments)
        for layer in block.layer_specs:
            layer.params["residual_scale"] = case.scale
            if case.norms:
                norms = ("post_self_attn_layernorm", "post_mlp_layernorm")
                layer.submodules = replace(layer.submodules, **dict.fromkeys(norms, layers.FrozenNorm))
            if not case.inputs:
                norms = ("input_layernorm", "pre_mlp_layernorm")
                layer.submodules = replace(layer.submodules, **dict.fromkeys(norms, IdentityOp))
        return block

    architecture, device = check_model(folder, topology.tp_size, LENGTH), ranks.device()
    with mock.patch.object(causal_lm, "layer_specs", spec):
        model = causal_lm.CausalLM(architecture, topology, dtype=torch.float32, device=device, vocab_multiple=1)
    parameters = dict(model.named_parameters())
    for name, value in planted.items():
        parameters.pop(name).copy_(torch.from_numpy(value))
    plans = copy_plans(
        architecture, topology.tp_rank, topology.tp_size, -(-VOCAB // topology.tp_size) * topology.tp_size
    )
    absent = {name: torch.empty(plan.shape) for name, plan in plans.items() if name not in parameters}
    assert bool(absent) is not case.inputs
    with open_checkpoint(folder) as checkpoint:
        sizes = {"tp_rank": topology.tp_rank, "tp_size": topology.tp_size}
        load_weights(parameters | absent, architecture, checkpoint, **sizes)
    if case.adapter:
        for layer in model.decoder.layers:
            layer.self_attn_bda.bottleneck, layer.mlp_bda.bottleneck = Adapter().to(device), Adapter().to(device)
    return model


def found(
    folder: Path, tensor: int, sequence: bool, case: Case, planted: dict[str, np.ndarray], broken: str = ""
) -> dict[str, np.ndarray]:
    """On one rank: return what `expected` returns, for this rank's gradient rows; then again with recomputation."""
    from lowrank_dist.model.layers import ResidualAdd

    topology = ranks.topology(tensor, sequence)
    model = planted_model(folder, topology, case, planted)
    last = model.decoder.layers[-1]
    if broken == "no_norm":
        last.mlp_bda = ResidualAdd(None, case.scale)
    elif broken == "no_scale":
        last.mlp_bda = ResidualAdd(last.post_mlp_layernorm, 1.0)
    elif broken == "adapter_last":
        last.mlp_bda = ResidualAdd(nn.Sequential(last.post_mlp_layernorm, last.mlp_bda.bottleneck), case.scale)
    ids, positions = tokens().to(ranks.device()), torch.arange(LENGTH, device=ranks.device()).expand(ROWS, LENGTH)
    weight = model.embedding.word_embeddings.weight.requires_grad_(True)
    results = {"logits": model.eval().logits(ids, positions).cpu().numpy()}
    for name, recompute in (("gradient", False), ("recomputed", True)):
        model.set_recompute(recompute)
        targets = torch.arange(ROWS * LENGTH, device=ids.device)
        model.loss(ids, positions, targets, ids.t().flatten()).backward()
        results[name] = weight.grad.cpu().numpy()
        weight.grad = None
    return results


def max_relative_error(results: list[dict[str, np.ndarray]], truth: dict[str, np.ndarray]) -> float:
    """Return the largest difference in logits and gradients, relative to the largest value."""
    gaps = []
    for name in ("gradient", "recomputed"):
        rows = np.concatenate([result[name] for result in results])[:VOCAB]
        gaps.append(np.abs(rows - truth["gradient"]).max() / np.abs(truth["gradient"]).max())
    for result in results:
        gaps.append(np.abs(result["logits"] - truth["logits"]).max() / np.abs(truth["logits"]).max())
    return float(max(gaps))


@pytest.mark.parametrize("name", CASES)
def test_equal_transformers(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    model, planted = referee(tmp_path, case)
    truth = expected(model)
    for tensor, sequence in LAYOUTS.values():
        results = run_ranks(tensor, found, tmp_path, tensor, sequence, case, planted)
        assert max_relative_error(results, truth) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "broken"), [("sandwich", "no_norm"), ("scale", "no_scale"), ("adapter", "adapter_last")]
)
def test_notices_what_is_broken(tmp_path: Path, name: str, broken: str) -> None:
    """Negative controls, in the last MLP alone."""
    model, planted = referee(tmp_path, CASES[name])
    results = run_ranks(2, found, tmp_path, 2, True, CASES[name], planted, broken)
    assert max_relative_error(results, expected(model)) > BROKEN
