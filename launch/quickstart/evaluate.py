"""Quickstart: score a Hugging Face folder on held-out verbs, and check training's outputs with PEFT and transformers.

    torchrun --nproc-per-node 2 -m launch.quickstart.evaluate score --model DIR --data eval.jsonl --out score.json
    python -m launch.quickstart.evaluate prove --base DIR --adapter DIR --merged DIR --probe probe.safetensors \\
        --base-score base.json --merged-score merged.json --out proof.json

score: greedy decoding and exact match as `lowrank-dist evaluate` has them; and the mean loss per target token
       (completion and end-of-turn token) in nats. Ranks share the verbs; no launcher is needed.
prove: probe.safetensors holds what the trained, sharded model itself computed: input_ids [b, s] int64 and logits
       [b, s, V] fp32. Plain PEFT on base + adapter and plain transformers on the merged folder must give the same
       logits (largest difference at most 1e-4 of the largest |logit|), and those must be far from the base's. Plain
       transformers must also write the same text as `score` for the first 10 verbs, with the base and with the merged
       folder. Of lowrank_dist only the error class and the printer run here.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from launch.quickstart.report import shortened
from lowrank_dist.backend.libraries import quiet_libraries
from lowrank_dist.data.batches import BatchSplit, eval_batches
from lowrank_dist.data.dataset import Dataset, load_dataset
from lowrank_dist.errors import UserError
from lowrank_dist.terminal import ProgressLines, say

if TYPE_CHECKING:
    from lowrank_dist.model.causal_lm import CausalLM
    from lowrank_dist.parallel.topology import Topology

LOSS_BATCH = 25
DECODING_BATCH = 50
PROVEN_TEXTS = 10
SHOWN_TEXTS = 3
TOLERANCE = 1e-4
FAR = 100 * TOLERANCE
_HELP = {
    "model": "folder of a Hugging Face model",
    "data": "JSONL file of prompts and completions",
    "base": "folder of the base model",
    "adapter": "folder of the trained adapter",
    "merged": "folder of the merged model",
    "probe": "probe.safetensors of the run",
    "base_score": "JSON file that score wrote for the base",
    "merged_score": "JSON file that score wrote for the merged model",
    "out": "JSON file to write the result to",
}


def score(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return exact match, loss and texts of one model folder on one file; None on ranks other than the first.

    texts: for every sample its prompt, its reference and what the model wrote.
    """
    quiet_libraries()
    # Imported here, after quiet_libraries: Megatron prints warnings when it is imported.
    from lowrank_dist.generate.decode import generate, summarize
    from lowrank_dist.generate.prompts import read_prompts
    from lowrank_dist.generate.sampling import SamplingParams
    from lowrank_dist.generate.session import load_for_generation, session
    from lowrank_dist.generate.texts import stop_tokens

    with session(1, "cpu") as job:
        tell: Callable[[str], None] = say if job.should_print else lambda line: None
        tell(f"score: loading {args.model}")
        loaded = load_for_generation(args.model, None, job.topology, job.backend.device, dtype="fp32")
        model, tokenizer = loaded.model, loaded.tokenizer
        vocab, positions = model.architecture.vocab, model.architecture.max_positions
        trained = load_dataset(args.data, tokenizer, positions, vocab)
        asked = read_prompts(args.data, tokenizer, stop_tokens(args.model, tokenizer), vocab=vocab, references=True)
        # Twice the longest completion: a model may spell a word in more tokens than the tokenizer does.
        decoding = SamplingParams(max_new_tokens=2 * int(trained.targets.max()), batch=DECODING_BATCH)
        ranks = job.topology.dp_size
        tell(f"score: {len(asked)} samples on {ranks} ranks, at most {decoding.max_new_tokens} tokens each")
        lines, batches = ProgressLines("score", "samples decoded", tell=tell), count(1)

        def decoded(rows: int) -> None:
            lines(next(batches) * DECODING_BATCH * ranks, len(asked))  # every rank has decoded a batch

        found = generate(model, tokenizer, asked, decoding, job.topology, decoded, in_step=True)
        lines = ProgressLines("score", "samples measured", tell=tell)
        loss = mean_loss(model, trained, positions, job.topology, lines)
        texts = [
            {"prompt": prompt.source, "reference": prompt.references[0], "text": generation.text}
            for prompt, generation in zip(asked, found, strict=True)
        ]
        match = summarize(found, asked, ("exact_match",))["exact_match"]
        result = {"samples": len(asked), "exact_match": match, "loss": loss}
        return {**result, "max_new_tokens": decoding.max_new_tokens, "texts": texts} if job.should_print else None


@torch.inference_mode()
def mean_loss(
    model: CausalLM, dataset: Dataset, max_length: int, topology: Topology, progress: Callable[[int, int], None]
) -> float:
    """Return the mean negative log-likelihood per target token [nats], to the bit the same on any number of ranks."""
    from lowrank_dist.generate.decode import gather_json

    # Batches are dealt out whole: a batch's padding, and so the last bit of its loss, does not depend on the ranks.
    split = BatchSplit(LOSS_BATCH, max_length, packing=False, dp_rank=0, dp_size=1, pad_multiple=1)
    (batch,) = eval_batches(dataset, split, global_batch=len(dataset))
    rank, ranks, total = topology.dp_rank, topology.dp_size, len(batch.microbatches)
    mine = {}
    for number in range(rank, total, ranks):
        m = batch.microbatches[number]
        mine[number] = model.loss(m.input_ids, m.position_ids, m.target_index, m.target_ids).item()
        progress(number * LOSS_BATCH, len(dataset))
    everyone = gather_json(list(mine.items()), topology.world_group, torch.device("cpu"))
    losses = dict(pair for part in everyone for pair in part)
    return sum(losses[number] for number in range(total)) / int(dataset.targets.sum())


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


@torch.inference_mode()
def equal_texts(folder: Path, scored: Mapping[str, Any]) -> int:
    """Return the number of texts that plain transformers writes as `score` did: all of the first PROVEN_TEXTS.

    Raises UserError with the first text that differs.
    """
    texts = scored["texts"][:PROVEN_TEXTS]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    model: Any = load_model(folder)
    stop = tokenizer.eos_token_id
    inputs = tokenizer([one["prompt"] for one in texts], return_tensors="pt", padding=True)
    limit = scored["max_new_tokens"]
    # Rows that have ended are padded with the stop token, so that it marks the end in every row.
    rows = model.generate(**inputs, do_sample=False, max_new_tokens=limit, eos_token_id=stop, pad_token_id=stop)
    written = (takewhile(lambda token: token != stop, row) for row in rows[:, inputs["input_ids"].shape[1] :].tolist())
    completions = [tokenizer.decode(list(row)) for row in written]
    for one, completion in zip(texts, completions, strict=True):
        if completion != one["text"]:
            raise UserError(
                f"{folder}: after {one['prompt']!r} plain transformers writes {completion!r}, "
                f"and lowrank_dist wrote {one['text']!r}"
            )
    return len(texts)


def prove(args: argparse.Namespace) -> dict[str, float]:
    """Return the relative logit differences of adapter, merged model and base from the trained sharded model.

    texts: how many texts of base and of merged model plain transformers wrote alike. Raises UserError where adapter or
    merged model differ by more than TOLERANCE, the base by less than FAR, or a text differs.
    """
    probe = load_file(args.probe)
    against = (probe["input_ids"], probe["logits"])
    result: dict[str, float] = {"tolerance": TOLERANCE}
    for name, where, load in (
        ("adapter", "base + adapter in plain PEFT", lambda: adapted(args.base, args.adapter)),
        ("merged", "merged folder in plain transformers", lambda: load_model(args.merged)),
        ("base", "base, for comparison", lambda: load_model(args.base)),
    ):
        result[name] = difference(load, *against)
        say(f"prove: {where}: logits differ by {result[name]:.1e} from the trained sharded model's")
    for name in ("adapter", "merged"):
        if not result[name] <= TOLERANCE:
            raise UserError(f"logits of the {name} differ from the trained model's by {result[name]:.1e} > {TOLERANCE}")
    if not result["base"] >= FAR:
        raise UserError(f"the trained model's logits differ from the base's by only {result['base']:.1e} < {FAR}")
    for name, folder, file in (("base", args.base, args.base_score), ("merged", args.merged, args.merged_score)):
        result["texts"] = equal_texts(folder, json.loads(file.read_text(encoding="utf-8")))
        say(f"prove: {name}: plain transformers writes the same text as lowrank_dist for {result['texts']} verbs")
    return result


def say_score(result: Mapping[str, Any]) -> None:
    """Say the result of `score` and the first texts."""
    say(f"score: exact match {result['exact_match']:.3f} on {result['samples']} samples, loss {result['loss']:.4f}")
    for one in result["texts"][:SHOWN_TEXTS]:
        say(f"  {shortened(one['prompt'])} → {shortened(one['text'])}")


def main() -> None:
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    proven = ("base", "adapter", "merged", "probe", "base_score", "merged_score")
    for run, names in ((score, ("model", "data")), (prove, proven)):
        about = (run.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(run.__name__, help=about, description=about)
        command.set_defaults(run=run)
        for name in (*names, "out"):
            option = f"--{name.replace('_', '-')}"
            command.add_argument(option, type=Path, required=True, metavar="PATH", help=_HELP[name])
    args = parser.parse_args()
    try:
        result = args.run(args)
    except UserError as error:
        say(f"{args.run.__name__}: {error}", err=True)
        sys.exit(2)
    if result is None:
        return
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.run is score:
        say_score(result)


if __name__ == "__main__":
    main()
