"""Quickstart: how good a Hugging Face folder is on held-out verbs, and whether the outputs of training are true.

    python -m launch.quickstart.evaluate score --model DIR --data eval.jsonl --out score.json
    python -m launch.quickstart.evaluate prove --base DIR --adapter DIR --merged DIR --probe probe.safetensors \\
        --out proof.json

score: greedy decoding and exact match as `lowrank-dist evaluate` has them; and the mean loss per target token
       (completion and end-of-turn token) in nats.
prove: probe.safetensors holds what the trained, sharded model itself computed: input_ids [b, s] int64 and logits
       [b, s, V] fp32. Plain PEFT on base + adapter and plain transformers on the merged folder must give the same
       logits (largest difference at most 1e-4 of the largest |logit|), and those must be far from the base's. Nothing
       of lowrank_dist runs here but its error class.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank_dist.backend.libraries import quiet_libraries
from lowrank_dist.data.batches import BatchSplit, eval_batches
from lowrank_dist.data.dataset import Dataset, load_dataset
from lowrank_dist.errors import UserError
from lowrank_dist.terminal import say

if TYPE_CHECKING:
    from lowrank_dist.model.causal_lm import CausalLM

BATCH = 25
TOLERANCE = 1e-4
FAR = 100 * TOLERANCE
_HELP = {
    "model": "folder of a Hugging Face model",
    "data": "JSONL file of prompts and completions",
    "base": "folder of the base model",
    "adapter": "folder of the trained adapter",
    "merged": "folder of the merged model",
    "probe": "probe.safetensors of the run",
    "out": "JSON file to write the result to",
}


def score(args: argparse.Namespace) -> dict[str, float]:
    """Return exact match and loss of one model folder on one file."""
    quiet_libraries()
    # Imported here, after quiet_libraries: Megatron prints warnings when it is imported.
    from lowrank_dist.generate.decode import EvaluationParams, evaluate_generation
    from lowrank_dist.generate.prompts import read_prompts
    from lowrank_dist.generate.sampling import SamplingParams
    from lowrank_dist.generate.session import load_for_generation, session
    from lowrank_dist.generate.texts import stop_tokens

    with session(1, "cpu") as job:
        loaded = load_for_generation(args.model, None, job.topology, job.backend.device, dtype="fp32")
        model, tokenizer = loaded.model, loaded.tokenizer
        vocab, positions = model.architecture.vocab, model.architecture.max_positions
        trained = load_dataset(args.data, tokenizer, positions, vocab)
        asked = read_prompts(args.data, tokenizer, stop_tokens(args.model, tokenizer), vocab=vocab, references=True)
        # Twice the longest completion: a model may spell a word in more tokens than the tokenizer does.
        decoding = SamplingParams(max_new_tokens=2 * int(trained.targets.max()), batch=BATCH)
        rules = EvaluationParams(("exact_match",), decoding)
        match = evaluate_generation(model, tokenizer, asked, rules, job.topology)["exact_match"]
        return {"samples": len(asked), "exact_match": match, "loss": mean_loss(model, trained, positions)}


@torch.inference_mode()
def mean_loss(model: CausalLM, dataset: Dataset, max_length: int) -> float:
    """Return the mean negative log-likelihood per target token [nats]."""
    split = BatchSplit(micro_batch=BATCH, max_length=max_length, packing=False, dp_rank=0, dp_size=1, pad_multiple=1)
    batches = eval_batches(dataset, split, global_batch=len(dataset))
    total = sum(
        model.loss(m.input_ids, m.position_ids, m.target_index, m.target_ids).item()
        for batch in batches
        for m in batch.microbatches
    )
    return total / int(dataset.targets.sum())


def load_model(folder: Path) -> PreTrainedModel:
    """Return the folder's model in fp32, loaded from safetensors only."""
    options = {"dtype": torch.float32, "local_files_only": True, "use_safetensors": True}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def adapted(base: Path, adapter: Path) -> PeftModel:
    """Return the base with the adapter, as plain PEFT loads it."""
    return PeftModel.from_pretrained(load_model(base), adapter, is_trainable=False).eval()


@torch.inference_mode()
def difference(
    load: Callable[[], PreTrainedModel | PeftModel], input_ids: torch.Tensor, expected: torch.Tensor
) -> float:
    """Return the largest |logit difference| over the largest expected |logit|. The model lives only for this call."""
    logits = load()(input_ids=input_ids, use_cache=False).logits
    if logits.shape != expected.shape:
        raise UserError(f"the probe's logits are {list(expected.shape)}, the model's {list(logits.shape)}")
    gc.collect()
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def prove(args: argparse.Namespace) -> dict[str, float]:
    """Return the relative logit differences of adapter, merged model and base from the trained sharded model.

    Raises UserError where adapter or merged model differ by more than TOLERANCE, or the base by less than FAR.
    """
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
        about = (run.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(run.__name__, help=about, description=about)
        command.set_defaults(run=run)
        for name in (*names, "out"):
            command.add_argument(f"--{name}", type=Path, required=True, metavar="PATH", help=_HELP[name])
    args = parser.parse_args()
    try:
        result = args.run(args)
    except UserError as error:
        say(f"{args.run.__name__}: {error}", err=True)
        sys.exit(2)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    say(f"{args.run.__name__}: " + ", ".join(f"{key} {value:.4g}" for key, value in result.items()))


if __name__ == "__main__":
    main()
