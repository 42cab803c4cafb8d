"""Quickstart: how good a plain Hugging Face folder is on held-out verbs, and whether the outputs of training are true.

    python -m launch.quickstart.evaluate score --model DIR --data eval.jsonl --out score.json
    python -m launch.quickstart.evaluate prove --base DIR --adapter DIR --merged DIR --probe probe.safetensors \\
        --out proof.json

Only transformers, PEFT and safetensors run here, nothing of lowrank_dist but its error class.

score: greedy `generate`, exact match of the text up to the end-of-turn token; and the mean loss per target token
       (completion and end-of-turn token) in nats.
prove: probe.safetensors holds what the trained, sharded model itself computed: input_ids [b, s] int64 and logits
       [b, s, V] fp32. Plain PEFT on base + adapter and plain transformers on the merged folder must give the same
       logits (largest difference at most 1e-4 of the largest |logit|), and those must be far from the base's.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_dist.errors import UserError

BATCH = 25
TOLERANCE = 1e-4
FAR = 100 * TOLERANCE


@dataclass(frozen=True)
class Sample:
    """One line of a prompt/completion file, tokenised; `completion` ends with the end-of-turn token."""

    prompt: list[int]
    completion: list[int]
    text: str


def load_model(folder: Path) -> PreTrainedModel:
    """The folder's model in fp32 from safetensors alone."""
    options = {"dtype": torch.float32, "local_files_only": True, "use_safetensors": True}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def read_samples(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """The samples in order of length, so that a batch holds little padding."""
    samples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        prompt, completion = (tokenizer(fields[key])["input_ids"] for key in ("prompt", "completion"))
        if tokenizer(fields["prompt"] + fields["completion"])["input_ids"] != prompt + completion:
            raise UserError(f"{path}: a token spans prompt and completion of {line}")
        samples.append(Sample(prompt, [*completion, tokenizer.eos_token_id], fields["completion"]))
    return sorted(samples, key=lambda sample: (len(sample.completion), len(sample.prompt)))


def batches(samples: list[Sample]) -> Iterator[list[Sample]]:
    for start in range(0, len(samples), BATCH):
        yield samples[start : start + BATCH]


def padded(rows: list[list[int]], value: int, left: bool) -> torch.Tensor:
    """[b, s] int64: the rows padded with `value` to the longest."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, fill, strict=True)])


@torch.inference_mode()
def exact_matches(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: list[Sample]) -> int:
    """How many completions greedy decoding gives exactly, ended by the end-of-turn token."""
    matches = 0
    for batch in batches(samples):
        prompts = [sample.prompt for sample in batch]
        input_ids = padded(prompts, tokenizer.pad_token_id, left=True)
        attention_mask = padded([[1] * len(prompt) for prompt in prompts], 0, left=True)
        # No completion of the batch is longer, so a row that is still going then is wrong whatever follows.
        limit = max(len(sample.completion) for sample in batch)
        tokens = model.generate(
            input_ids=input_ids, attention_mask=attention_mask, do_sample=False, max_new_tokens=limit
        )
        for sample, row in zip(batch, tokens[:, input_ids.shape[1] :].tolist(), strict=True):
            if tokenizer.eos_token_id in row:
                matches += tokenizer.decode(row[: row.index(tokenizer.eos_token_id)]) == sample.text
    return matches


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, samples: list[Sample]) -> float:
    """Mean negative log-likelihood per target token [nats]."""
    total, targets = 0.0, 0
    for batch in batches(samples):
        input_ids = padded([sample.prompt + sample.completion for sample in batch], 0, left=False)
        labels = padded([[-100] * len(sample.prompt) + sample.completion for sample in batch], -100, left=False)
        count = int((labels != -100).sum())
        total += count * model(input_ids=input_ids, labels=labels, use_cache=False).loss.item()
        targets += count
    return total / targets


def score(args: argparse.Namespace) -> dict[str, float]:
    """Exact match and loss of one folder on one file."""
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    model = load_model(args.model)
    samples = read_samples(args.data, tokenizer)
    matches = exact_matches(model, tokenizer, samples)
    return {"samples": len(samples), "exact_match": matches / len(samples), "loss": mean_loss(model, samples)}


def adapted(base: Path, adapter: Path) -> PeftModel:
    """The base with the adapter, as plain PEFT loads it."""
    return PeftModel.from_pretrained(load_model(base), adapter, is_trainable=False).eval()


@torch.inference_mode()
def difference(
    load: Callable[[], PreTrainedModel | PeftModel], input_ids: torch.Tensor, expected: torch.Tensor
) -> float:
    """Largest |logit difference| over the largest expected |logit|. The model lives only for this call."""
    logits = load()(input_ids=input_ids, use_cache=False).logits
    if logits.shape != expected.shape:
        raise UserError(f"the probe's logits are {list(expected.shape)}, the model's {list(logits.shape)}")
    gc.collect()
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def prove(args: argparse.Namespace) -> dict[str, float]:
    """Relative logit differences of base, adapter and merged model from the trained sharded model."""
    probe = load_file(args.probe)
    against = (probe["input_ids"], probe["logits"])
    result = {
        "tolerance": TOLERANCE,
        "adapter": difference(lambda: adapted(args.base, args.adapter), *against),
        "merged": difference(lambda: load_model(args.merged), *against),
        "base": difference(lambda: load_model(args.base), *against),
    }
    for name in ("adapter", "merged"):
        if not result[name] <= TOLERANCE:
            raise UserError(f"logits of the {name} differ from the trained model's by {result[name]:.1e} > {TOLERANCE}")
    if not result["base"] >= FAR:
        raise UserError(f"the trained model's logits differ from the base's by only {result['base']:.1e} < {FAR}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run, names in ((score, ("model", "data")), (prove, ("base", "adapter", "merged", "probe"))):
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run)
        for name in (*names, "out"):
            command.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    try:
        result = args.run(args)
    except UserError as error:
        print(f"{args.run.__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{args.run.__name__}: " + ", ".join(f"{key} {value:.4g}" for key, value in result.items()), flush=True)


if __name__ == "__main__":
    main()
