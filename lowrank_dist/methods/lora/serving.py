"""Export of a LoRA adapter for programs that read less of its config than PEFT: vLLM and llama.cpp's converter.

llama.cpp's convert_lora_to_gguf.py reads lora_alpha only and scales each module by lora_alpha over the module's rank.
vLLM reads r, lora_alpha and use_rslora and applies one scale to all modules. With one rank, one alpha and no rsLoRA
both apply the same scales as PEFT. Sources: llama-cpp-python 0.3.36 and vLLM's main of November 2026.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from torch.nn.functional import pad

from lowrank_dist.arch.families import FAMILIES
from lowrank_dist.arch.wrappers import WRAPPED
from lowrank_dist.formats.safetensors_file import write_fp32
from lowrank_dist.methods.files import CONFIG_FILE, LLAMA_CPP, VLLM, WEIGHTS_FILE, NotServed
from lowrank_dist.methods.lora.files import AdapterFactors, LowRankFactor, named_tensors, require_finite
from lowrank_dist.methods.lora.peft_config import OUTPUT_LAYER, PeftConfig

# vLLM's LoRAConfig.max_lora_rank (vllm.config.lora.MaxLoRARanks without 1) and its default.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
_MERGE = "merge it into the base with lowrank-dist merge"
# Program → family for which it accepts no LoRA adapter → reason and remedy.
_WITHOUT_LORA: Mapping[str, Mapping[str, str]] = {
    VLLM: {"gpt2": f"vLLM supports no LoRA on GPT-2; {_MERGE}"},
    LLAMA_CPP: {
        "gpt2": "llama.cpp's converter transposes GPT-2's factors like its weights, although only the weights are "
        f"stored transposed; {_MERGE}",
        "opt": "llama.cpp's converter does not support OPT, merged or not; serve it with vLLM or transformers",
        "phi3": f"llama.cpp's converter has not been tried with adapters of a phi3; {_MERGE}",
        "glm4": f"llama.cpp's converter has not been tried with adapters of a glm4; {_MERGE}",
        **dict.fromkeys(
            (family.model_class for family in WRAPPED),
            f"llama.cpp's converter has not been tried with adapters of models of images and text; {_MERGE}",
        ),
    },
}
# llama.cpp reads an alpha that is zero in fp32 as "no scaling", not as a zero update.
_SMALLEST_ALPHA = 2.0**-126


def refuse_unserved(
    source: Path, config: PeftConfig, adapter: AdapterFactors, target: str, max_rank: int | None
) -> None:
    """Raise NotServed, with every reason, where `target` would refuse the adapter or compute another update.

    max_rank: the --max-lora-rank with which vLLM is started.
    """
    problems = [f"{target} does not serve DoRA; {_MERGE}"] if config.dora else []
    families, without = _families(adapter.factors), _WITHOUT_LORA[target]
    if families <= without.keys():
        problems += sorted({without[name] for name in families})
    if target == VLLM:
        problems += _rank_problems(adapter, max_rank)
    if problems:
        raise NotServed(source, target, problems)


def _families(modules: Collection[str]) -> set[str]:
    """Return the families that have linears of all these names. The output layer has one name in all families."""
    inner = set(modules) - {OUTPUT_LAYER}
    families = [*FAMILIES.items(), *((family.model_class, family) for family in WRAPPED)]
    return {name for name, family in families if all(_linear_of(family.linears, module) for module in inner)}


def _linear_of(linears: Mapping[str, tuple[str, ...]], module: str) -> bool:
    paths = [path for names in linears.values() for path in names]
    return any(re.fullmatch(re.escape(path).replace(r"\{layer\}", r"\d+"), module) for path in paths)


def serving_rank(rank: int) -> int | None:
    """Return the smallest --max-lora-rank with which vLLM serves an adapter of rank `rank`; None where none does."""
    return next((size for size in VLLM_RANKS if size >= rank), None)


def _rank_problems(adapter: AdapterFactors, max_rank: int | None) -> list[str]:
    module = max(adapter.factors, key=lambda module: adapter.factors[module].rank)
    largest = adapter.factors[module].rank
    problems = []
    if max_rank is not None and max_rank not in VLLM_RANKS:
        problems.append(
            f"--max-rank {max_rank}: not a rank that vLLM accepts; give one of {', '.join(map(str, VLLM_RANKS))}"
        )
    fitting = serving_rank(largest)
    if largest > (max_rank or VLLM_DEFAULT_RANK):
        remedy = (
            _MERGE if fitting is None else f"give --max-rank {fitting} and start vLLM with --max-lora-rank {fitting}"
        )
        limit = f"--max-rank {max_rank}" if max_rank else f"vLLM's default --max-lora-rank of {VLLM_DEFAULT_RANK}"
        problems.append(f"its largest rank, {largest} (of {module}), is above {limit}; {remedy}")
    return problems


def serving_notes(adapter: AdapterFactors, target: str) -> list[str]:
    """Return the note for vLLM on factors of the output layer, which it accepts in some model families only."""
    if target != VLLM or OUTPUT_LAYER not in adapter.factors:
        return []
    return [f"vLLM supports factors of {OUTPUT_LAYER} only in some families; if it refuses them, {_MERGE}"]


def reads_alike(config: PeftConfig, adapter: AdapterFactors) -> bool:
    """Return whether every module has rank r and scale lora_alpha / r, so that programs agree on the scales."""
    sizes = {(factor.rank, factor.alpha) for factor in adapter.factors.values()}
    return sizes == {(config.rank, config.alpha)} and not config.rslora and abs(config.alpha) >= _SMALLEST_ALPHA


def folded(adapter: AdapterFactors) -> AdapterFactors:
    """Return an equivalent adapter with the largest rank for every module, lora_alpha = r, and s folded into B.

    Factors of smaller rank are padded with zero rows of A and zero columns of B.
    """
    rank = max(factor.rank for factor in adapter.factors.values())
    return replace(
        adapter,
        factors={module: _fold(factor, rank, adapter.rslora) for module, factor in adapter.factors.items()},
        rslora=False,
    )


def _fold(factor: LowRankFactor, rank: int, rslora: bool) -> LowRankFactor:
    missing = rank - factor.rank
    b = (factor.b.double() * factor.scale(rslora)).float()
    return LowRankFactor(pad(factor.a, (0, 0, 0, missing)), pad(b, (0, missing)), float(rank), factor.magnitude)


def write_folded(folder: Path, config: PeftConfig, adapter: AdapterFactors) -> None:
    """Write the result of `folded` into an existing folder. config: that of the original adapter.

    Raises UserError where s·B overflows fp32.
    """
    rank = next(iter(adapter.factors.values())).rank
    alike = replace(config, rank=rank, alpha=float(rank), rslora=False, rank_pattern={}, alpha_pattern={})
    tensors = named_tensors(adapter)
    require_finite(folder, tensors, "its scale times B overflows fp32; merge it into the base with lowrank-dist merge")
    (folder / CONFIG_FILE).write_text(alike.to_json(), encoding="utf-8")
    write_fp32(folder / WEIGHTS_FILE, tensors)
