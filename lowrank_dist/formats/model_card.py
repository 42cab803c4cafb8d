"""README.md of an exported adapter: a Hugging Face model card. Text that comes from files is escaped.

Each method writes the description and usage of its adapter; this module writes the rest of the card.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lowrank_dist.formats.provenance import Provenance
from lowrank_dist.terminal import escape_all

USE = "## Use\n\nBASE is the folder or name of the base model, ADAPTER is this folder."
WITH_PEFT = """    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "ADAPTER")
    tokenizer = AutoTokenizer.from_pretrained("ADAPTER")
    model.generation_config = GenerationConfig.from_pretrained("ADAPTER")  # with its end-of-text tokens

If ADAPTER has no tokenizer or no generation_config.json, put BASE in that line."""
WITH_GENERATE = """With lowrank-dist, on any number of GPUs:

    lowrank-dist generate --model BASE --adapter ADAPTER --prompt TEXT"""
NOT_MERGED = (
    "It cannot be merged into the base's weights, and vLLM does not serve it, since LoRA is the only kind of "
    "adapter that it serves."
)
_LONGEST_TEXT = 300
_LONGEST_BLOCK = 8000
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
# A hyphen or an underscore between letters or digits is no markup, and usual in names.
_MARKUP = re.compile(r"([\\`*{}\[\]()<>#+!|~&$@:]|(?<![A-Za-z0-9])[-_]|[-_](?![A-Za-z0-9]))")


def model_card(
    name: str, tag: str, base: str, about: str, usage: str, provenance: Provenance | None, library: str = "peft"
) -> str:
    """Return the card of an adapter of `base`. about, usage: Markdown, with text from files escaped by `plain`."""
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
    """Return the base as a repository of the Hub, None for a local path, which the Hub does not take as base_model."""
    odd = ".." in base or "--" in base or base.endswith((".git", ".", "-"))
    return base if _REPOSITORY.fullmatch(base) and not odd and not Path(base).exists() else None


def plain(value: Any) -> str:
    """Return the value as one line of bounded length, escaped so that Markdown and HTML show it as it is."""
    text = str(value)
    text = text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"
    return _MARKUP.sub(r"\\\1", escape_all(text))


def base_model(base: str) -> str:
    """Return words for the base, to be used in a sentence."""
    return f"the base model {plain(base)}" if base else "an unnamed base model"


def _origin(provenance: Provenance) -> str:
    training = _mapping(provenance.training)
    data = _mapping(training.get("data"))
    labels = {
        "Fingerprint of the base": provenance.base_fingerprint,
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
        "SHA-256 of the data": data.get("sha256"),
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
    """Return a section with YAML as an indented block: unlike a fence, no text inside can end it."""
    try:
        text = yaml.safe_dump(values, sort_keys=False, width=100)
    except RecursionError:
        text = "not shown: nested too deeply"
    text = text if len(text) <= _LONGEST_BLOCK else f"{text[:_LONGEST_BLOCK]}\n… (cut)"
    return "\n".join([f"## {title}", "", *(f"    {line}" for line in text.splitlines())])


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
