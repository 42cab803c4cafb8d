"""Check that a merged folder in plain transformers gives the logits of base + adapters in plain PEFT.

None of our own model code runs. Models are loaded whole, one at a time, in fp32 on the CPU, so unlike the merge itself
this needs the memory of the model.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.errors import UserError
from lowrank_dist.formats.safetensors_file import read_header
from lowrank_dist.formats.text_files import TOKENIZER_FILES
from lowrank_dist.merging.options import WeightedAdapter

SAMPLE = (
    "The quick brown fox jumps over the lazy dog, and nobody in the village was surprised.",
    "In 1969, two people walked on the Moon; a third one stayed in orbit and waited for them.",
    "def mean(values):\n    return sum(values) / len(values)",
    "Question: What is the capital of France? Answer: Paris. Question: And of Italy? Answer:",
)
# Three sets of logits are held at once, each 0.5 GB for 1024 positions at a vocabulary of 128 000.
_LINES, _TOKENS = 8, 128
# Largest accepted difference of logits, relative to the largest |logit|. In fp32 only the order of sums differs:
# measured 7e-7 to 5e-6 on random models of 8 layers of every family. In bf16 and fp16 the merged weights are rounded,
# by up to 2⁻⁹ and 2⁻¹² of each: measured 0.006 to 0.044 and 0.0008 to 0.005 on the same models, 0.010 and 0.001 on
# SmolLM2-135M. Only updates larger than the weights themselves exceeded these.
TOLERANCES = {"F64": 1e-4, "F32": 1e-4, "BF16": 0.05, "F16": 0.01}


@dataclass(frozen=True)
class Verification:
    """The result of the comparison, over `positions` of `source` ("built-in text", …).

    difference, effect: largest |logit − expected| of the merged model and of the base alone, relative to the largest
    |expected|. tolerance: upper bound of `difference`. agreement: share of positions with the same argmax.
    """

    source: str
    positions: int
    difference: float
    effect: float
    agreement: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"verified on {self.source}, {self.positions} positions: largest logit difference from base + adapter in "
            f"PEFT {self.difference:.1e} of the largest logit (tolerance {self.tolerance:g}; the adapter itself "
            f"changes them by {self.effect:.1e}), argmax agrees at {self.agreement:.2%}"
        )


class Verifier:
    """Compares a merged folder with base + adapters. The constructor checks all that can be checked before the merge.

    text: a file whose first non-empty lines are the sample; None for built-in text. Raises UserError where PEFT is not
    installed, a text cannot be read or is empty, or the tokenizer cannot be loaded.
    """

    def __init__(self, base: Path, adapters: Sequence[WeightedAdapter], text: Path | None = None) -> None:
        if importlib.util.find_spec("peft") is None:
            raise UserError("--verify: PEFT is not installed; run `pip install peft`, or leave --verify out")
        self._base, self._adapters = base, tuple(adapters)
        self._source, self._samples = _samples(base, text)

    def __call__(self, merged: Path) -> Verification:
        """Verify the folder and return the result.

        Raises UserError where the logits are not those of base + adapters, or no closer to them than the base's.
        """
        plain, expected = self._reference()
        found = _logits(_load(merged), self._samples)
        stored = {entry.dtype for path in merged.glob("*.safetensors") for entry in read_header(path).entries}
        tolerance = max(TOLERANCES[dtype] for dtype in stored & set(TOLERANCES))
        largest = expected.abs().max()
        result = Verification(
            self._source,
            expected.size(0),
            float((found - expected).abs().max() / largest),
            float((plain - expected).abs().max() / largest),
            float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
            tolerance,
        )
        if torch.equal(found, plain):
            raise UserError("--verify: the merged model's logits equal the base's, so the adapter was not merged")
        # `not <=`, so that NaN fails.
        if not result.difference <= tolerance:
            rounding = "" if tolerance < 1e-3 else "; --dtype fp32 shows whether it is only rounding"
            raise UserError(f"--verify: the merged model differs from base + adapter: {_what(result)}{rounding}")
        # The tolerance may be wider than the effect of a weak adapter; then it would accept any merge.
        if not _rms(found - expected) < _rms(plain - expected):
            raise UserError(
                "--verify: rounding the merged weights changes the logits as much as the adapter does: "
                f"{_what(result)}; store with --dtype fp32, or train longer"
            )
        return result

    def _reference(self) -> tuple[Tensor, Tensor]:
        """Return the logits of the base, and of base + Σ w·s·B·A with all adapters active and unmerged in PEFT."""
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer

        model = _load(self._base)
        plain = _logits(model, self._samples)
        names = [f"adapter_{index}" for index in range(len(self._adapters))]
        try:
            peft = PeftModel.from_pretrained(model, self._adapters[0].path, adapter_name=names[0])
            for name, adapter in zip(names[1:], self._adapters[1:], strict=True):
                peft.load_adapter(adapter.path, adapter_name=name)
            combined: Any = peft.base_model
            combined.set_adapter(names)
        except Exception as error:  # PEFT raises types with no common base
            raise UserError(f"--verify: PEFT cannot load the adapter: {error}") from error
        # Not add_weighted_adapter, which is not exact for adapters with different targets and ranks.
        for module in peft.modules():
            if isinstance(module, LoraLayer):
                scaling: dict[str, float] = module.scaling
                for name, adapter in zip(names, self._adapters, strict=True):
                    if name in scaling:
                        scaling[name] *= adapter.weight
        return plain, _logits(peft, self._samples)


def _what(result: Verification) -> str:
    return (
        f"its logits differ from PEFT's by {result.difference:.2e} of the largest logit (tolerance "
        f"{result.tolerance:g}) and the base's by {result.effect:.2e}, and the argmax agrees at "
        f"{result.agreement:.2%} of {result.positions} positions"
    )


def _rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


def _load(folder: Path) -> nn.Module:
    kind = AutoModelForImageTextToText if read_architecture(folder).reads_images else AutoModelForCausalLM
    try:
        return kind.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        ).eval()
    except Exception as error:  # transformers raises types with no common base
        raise UserError(f"--verify: transformers cannot load {folder}: {error}") from error


@torch.no_grad()
def _logits(model: nn.Module, samples: Sequence[Tensor]) -> Tensor:
    """Return [positions, vocabulary] over all samples, each run on its own."""
    return torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in samples])


def _samples(base: Path, text: Path | None) -> tuple[str, list[Tensor]]:
    """Return the name of the sample's source, and the token ids of each line."""
    architecture = read_architecture(base)
    length = min(_TOKENS, architecture.max_positions)
    lines = SAMPLE if text is None else _lines(text)
    if not any((base / name).is_file() for name in TOKENIZER_FILES):
        if text is not None:
            raise UserError(
                f"--verify-text {text}: {base} has no tokenizer; leave --verify-text out to verify on random tokens"
            )
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(architecture.vocab, (len(SAMPLE), min(32, length)), generator=generator)
        return "random tokens (the base has no tokenizer)", list(ids)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises types with no common base
        raise UserError(f"--verify: the tokenizer of {base} cannot be loaded: {error}") from error
    tokens = [
        tokenizer(line, truncation=True, max_length=length, return_tensors="pt")["input_ids"][0] for line in lines
    ]
    return "built-in text" if text is None else str(text), [ids for ids in tokens if len(ids)]


def _lines(text: Path) -> list[str]:
    try:
        with text.open(encoding="utf-8") as file:
            lines = list(islice((line.strip() for line in file if line.strip()), _LINES))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--verify-text {text} cannot be read: {error}") from error
    if not lines:
        raise UserError(f"--verify-text {text} has no text; give a file with at least one line")
    return lines
