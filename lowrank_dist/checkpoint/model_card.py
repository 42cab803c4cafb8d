"""README.md of an exported adapter: a Hugging Face model card. What comes from files is text, never markup."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lowrank_dist.formats.provenance import Provenance
from lowrank_dist.messages import printable
from lowrank_dist.methods.bottleneck.files import Bottlenecks, places
from lowrank_dist.methods.lora.files import Adapter
from lowrank_dist.methods.prompt_files import PromptLearning

# vLLM's LoRAConfig.max_lora_rank (vllm.config.lora.MaxLoRARanks without 1) and its default.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
_USE = "## Use\n\nBASE is the base model's folder or name, ADAPTER this folder."
_WITH_PEFT = """    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "ADAPTER")"""
_WITH_GENERATE = """With lowrank-dist, on any number of GPUs:

    lowrank-dist generate --model BASE --adapter ADAPTER --prompt TEXT"""
_NO_WEIGHT = (
    "It cannot be merged into the base's weights, and vLLM does not serve it: of adapters it serves LoRA alone."
)
_LONGEST_TEXT = 300
_LONGEST_BLOCK = 8000
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#+!|~&$@:-])")


def model_card(name: str, adapter: Adapter, provenance: Provenance | None, largest_rank: int) -> str:
    """The card of a LoRA adapter. name: the adapter's; largest_rank: over its modules, which vLLM has to be told."""
    return _card(name, "lora", "peft", adapter.base, _about(adapter), _usage(largest_rank), provenance)


def prompt_learning_card(name: str, learned: PromptLearning, provenance: Provenance | None) -> str:
    """The card of a prefix or a prompt."""
    length, size = learned.embeddings.size(0), learned.embeddings.numel()
    if learned.kind == "PREFIX_TUNING":
        tag, what = "prefix-tuning", f"A prefix for {_of(learned.base)}: keys and values at {length} positions of"
        what += f" every one of {learned.layers} layers, {size:,} parameters."
    else:
        tag, what = "prompt-tuning", f"A prompt for {_of(learned.base)}: embeddings at {length} positions before the"
        what += f" input, {size:,} parameters."
    usage = f"{_USE}\n\n{_WITH_PEFT}\n\n{_WITH_GENERATE}\n\n{_NO_WEIGHT}"
    return _card(name, tag, "peft", learned.base, what, usage, provenance)


def bottlenecks_card(name: str, bottlenecks: Bottlenecks, provenance: Provenance | None) -> str:
    """The card of adapter layers."""
    config, size = bottlenecks.config, sum(tensor.numel() for tensor in bottlenecks.tensors.values())
    what = (
        f"Adapter layers ({plain(config.method)}) of {_of(config.base)}: bottlenecks of width {config.bottleneck} "
        f"after {' and '.join(places(config.method))} in every one of {config.layers} layers, {size:,} parameters."
    )
    usage = f"{_USE}\n\n{_WITH_GENERATE}\n\nPEFT has no such method. {_NO_WEIGHT}"
    return _card(name, "adapter-layers", "lowrank_dist", config.base, what, usage, provenance)


def _card(name: str, tag: str, library: str, base: str, about: str, usage: str, provenance: Provenance | None) -> str:
    front: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": [tag, "lowrank_dist"],
    }
    repository = repository_of(base)
    if repository is not None:
        front = {"base_model": repository, **front}
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---", f"# {plain(name)}", about]
    if provenance is not None:
        parts += [_origin(provenance), _block("Configuration", provenance.config)]
        parts += [_block("Versions", {"created_by": provenance.created_by, **_mapping(provenance.versions)})]
    return "\n\n".join([*parts, usage]) + "\n"


def repository_of(base: str) -> str | None:
    """The base as a repository of the Hub, None for a local path: the Hub takes nothing else as base_model."""
    odd = ".." in base or "--" in base or base.endswith((".git", ".", "-"))
    return base if _REPOSITORY.fullmatch(base) and not odd and not Path(base).exists() else None


def plain(value: Any) -> str:
    """One line of bounded text that Markdown and HTML show as it is."""
    text = str(value)
    text = text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"
    return _MARKUP.sub(r"\\\1", printable(text))


def _about(adapter: Adapter) -> str:
    ranks = sorted({factor.rank for factor in adapter.factors.values()})
    size = sum(factor.a.numel() + factor.b.numel() for factor in adapter.factors.values())
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return f"A LoRA adapter of {_of(adapter.base)}: {rank}, {len(adapter.factors)} modules, {size:,} parameters."


def _of(base: str) -> str:
    return f"the base model {plain(base)}" if base else "a base model that it does not name"


def _origin(provenance: Provenance) -> str:
    training = _mapping(provenance.training)
    data = _mapping(training.get("data"))
    labels = {
        "Base's fingerprint": provenance.base_fingerprint,
        "Step": training.get("step"),
        "Epochs": training.get("epoch"),
        "Tokens": training.get("tokens"),
        "Target tokens": training.get("target_tokens"),
        "Training loss": training.get("loss"),
        "Evaluation loss": training.get("eval_loss"),
        "Exact match": training.get("eval_exact_match"),
        "BLEU": training.get("eval_bleu"),
        "ROUGE-L": training.get("eval_rouge_l"),
        "Data": data.get("path"),
        "Data's SHA-256": data.get("sha256"),
        "Samples": data.get("samples"),
    }
    rows = [f"| {label} | {plain(_number(value))} |" for label, value in labels.items() if value is not None]
    return "\n".join(["## Training", "", "| | |", "|---|---|", *rows])


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if isinstance(value, int) or not math.isfinite(value):
        return str(value) if abs(value) < 1e18 or not isinstance(value, int) else "over 10^18"
    return f"{value:.6g}"


def _block(title: str, values: Any) -> str:
    """YAML in an indented block: unlike a fence, no text inside can end it."""
    try:
        text = yaml.safe_dump(values, sort_keys=False, width=100)
    except RecursionError:
        text = "not shown: nested too deeply"
    text = text if len(text) <= _LONGEST_BLOCK else f"{text[:_LONGEST_BLOCK]}\n… (cut)"
    return "\n".join([f"## {title}", "", *(f"    {line}" for line in text.splitlines())])


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _usage(largest_rank: int) -> str:
    rank = f" --max-lora-rank {serving_rank(largest_rank) or largest_rank}" if largest_rank > VLLM_DEFAULT_RANK else ""
    return f"""{_USE}

{_WITH_PEFT}

Merged into the base, as fast as the base alone:

    lowrank-dist merge --base BASE --adapter ADAPTER --out MERGED --verify

Served by vLLM (an adapter with rank or alpha patterns has to be merged first):

    vllm serve BASE --enable-lora{rank} --lora-modules adapter=ADAPTER"""


def serving_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank under which vLLM serves an adapter of `rank`; None where there is none."""
    return next((size for size in VLLM_RANKS if size >= rank), None)
