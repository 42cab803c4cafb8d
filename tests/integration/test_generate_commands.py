"""`lowrank-dist generate` and `evaluate` as a user types them: alone, on ranks, and with invalid arguments."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.dist import ranks
from tests.dist.ranks import run_ranks
from tests.integration.launching import LAUNCHER_VARIABLES, Outcome, program, write_jsonl
from tests.tiny_adapters import random_adapter, save_adapter
from tests.tiny_models import make_tiny

PROMPTS = ("the cat", "a", "in the tin: ", "er er er er", "hen?")
NEW = 12


def command(size: int, *arguments: object, stdin: str = "") -> list[Outcome]:
    """Run `lowrank-dist …` on pooled ranks as under a launcher; with one rank, as started by hand."""
    return run_ranks(size, _command, [str(argument) for argument in arguments], stdin)


def _apart(each: list[list[str]]) -> Outcome:
    """Inside a rank: run the command with this rank's own arguments."""
    import torch.distributed as dist

    return _command(each[dist.get_rank()])


def _command(arguments: list[str], stdin: str = "") -> Outcome:
    import torch.distributed as dist
    from typer.testing import CliRunner

    from lowrank_dist.backend import select
    from lowrank_dist.cli.main import app
    from lowrank_dist.generate import session

    size = dist.get_world_size()
    if dist.get_rank() == 0:
        dist.distributed_c10d._get_default_store().delete_key("lowrank_dist/decoding_failed")
    dist.barrier()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ))
        if size == 1:
            for name in LAUNCHER_VARIABLES:
                os.environ.pop(name, None)
        # The ranks have met and keep their groups.
        stack.enter_context(mock.patch.object(select, "init_process_group", lambda backend, _: backend))
        stack.enter_context(mock.patch.object(select, "shutdown"))
        kept = SimpleNamespace(build=lambda tensor, *_: ranks.topology(tensor, False))
        stack.enter_context(mock.patch.object(session, "Topology", kept))
        result = CliRunner().invoke(app, arguments, input=stdin if dist.get_rank() == 0 else None)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("commands") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    factors = random_adapter(base, lambda module: None if module == "lm_head" else (2, 4.0))
    return save_adapter(base.parent / "adapter", base, factors)


@pytest.fixture(scope="module")
def asked(base: Path) -> Path:
    return write_jsonl(base.parent / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])


def transformers_texts(folder: Path) -> list[str]:
    from lowrank_dist.data.tokenizer import load_tokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    tokenizer, texts = load_tokenizer(folder), []
    for ids in tokenizer.encode(PROMPTS):
        row = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=NEW)[0, len(ids) :].tolist()
        texts.append(tokenizer.decode(row[: row.index(1)] if 1 in row else row))
    return texts


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_prompt_prints_its_completion(base: Path) -> None:
    (done,) = command(1, "generate", "--model", base, "--prompt", PROMPTS[0], "--max-new-tokens", NEW)
    assert (done.code, done.stdout) == (0, transformers_texts(base)[0] + "\n")
    assert done.stderr == "1 of 1 completions reached their length limit (--max-new-tokens, or the model's positions)\n"


def test_what_the_files_say_in_vain_is_said_first(base: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    config = json.loads((base / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5, "odd": 1}))
    (other / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 1, "do_sample": True, "temperature": 0.6})
    )
    (done,) = command(1, "generate", "--model", other, "--prompt", PROMPTS[0], "--max-new-tokens", NEW)
    assert (done.code, done.stdout) == (0, transformers_texts(base)[0] + "\n")
    assert done.stderr.splitlines()[:-1] == [
        f"{other / 'config.json'}: dropout of the base is not applied: attention_dropout=0.5",
        f"{other / 'config.json'}: unknown keys, which have no effect: odd",
        f"{other / 'generation_config.json'}: not applied; decoding uses its own options: do_sample=True, "
        "temperature=0.6",
    ]


@pytest.mark.parametrize(("size", "tensor"), [(1, 1), (2, 2), (2, 1)])
def test_a_file_of_prompts_in_its_order(base: Path, asked: Path, size: int, tensor: int, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    options = ("--max-new-tokens", NEW, "--batch", 2, "--tensor", tensor)
    done = command(size, "generate", "--model", base, "--prompts", asked, "--out", out, *options)
    assert [outcome.code for outcome in done] == [0] * size and all(not outcome.stdout for outcome in done)
    found, expected = lines(out), transformers_texts(base)
    assert [line["prompt"] for line in found] == list(PROMPTS)
    assert [line["completion"] for line in found] == expected
    assert all((line["finish_reason"] == "length") == (len(line["tokens"]) == NEW) for line in found)
    assert f"{out}: 5 completions" in done[0].stderr and not any(outcome.stderr for outcome in done[1:])
    # Without --out the same lines are printed.
    printed = command(size, "generate", "--model", base, "--prompts", asked, *options)[0].stdout
    assert [json.loads(line) for line in printed.splitlines()] == found


def test_an_adapter_decodes_as_its_merged_folder(base: Path, adapter: Path, asked: Path, tmp_path: Path) -> None:
    from lowrank_dist.merging.merge import merge
    from lowrank_dist.merging.options import parse_adapter

    merge(base, [parse_adapter(str(adapter))], tmp_path / "merged")
    options = ("--prompts", asked, "--max-new-tokens", NEW, "--tensor", 2)
    adapted, merged, plain = (
        command(2, "generate", *model, *options)[0].stdout
        for model in (
            ("--model", base, "--adapter", adapter),
            ("--model", tmp_path / "merged"),
            ("--model", base),
        )
    )
    assert adapted == merged != plain
    assert [json.loads(line)["completion"] for line in merged.splitlines()] == transformers_texts(tmp_path / "merged")


def test_an_adapter_is_read_with_the_tokenizer_that_it_was_trained_with(base: Path, tmp_path: Path) -> None:
    from lowrank_dist.formats.text_files import TextFiles

    plain = Path(shutil.copytree(base, tmp_path / "plain"))
    config = json.loads((plain / "tokenizer_config.json").read_text())
    (plain / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": None}))
    factors = random_adapter(plain, lambda module: None if module == "lm_head" else (2, 4.0))
    tuned = save_adapter(tmp_path / "adapter", plain, factors)
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "the cat"}]}])
    options = ("--model", plain, "--adapter", tuned, "--prompts", chats, "--max-new-tokens", 2)
    (refused,) = command(1, "generate", *options)
    assert refused.code == 2 and "has no chat template" in refused.stderr
    TextFiles.of_run(base, plain, [4]).write(tuned)
    (done,) = command(1, "generate", *options)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["prompt"] == [{"role": "user", "content": "the cat"}]


def test_messages_go_through_the_template(base: Path, tmp_path: Path) -> None:
    """The template turns messages into the same text."""
    chat = [{"role": "user", "content": "the hen?"}]
    text = "<|im_start|>user\nthe hen?<|im_end|>\n<|im_start|>assistant\n"
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat}])
    chats, plain = (
        command(1, "generate", "--model", base, *option, "--max-new-tokens", NEW)[0].stdout
        for option in (("--prompts", path), ("--prompt", text))
    )
    assert json.loads(chats)["prompt"] == chat and json.loads(chats)["completion"] == plain[:-1]


def test_a_stop_text_ends_a_completion(base: Path) -> None:
    whole = transformers_texts(base)[0]
    stop = whole[4:6]
    options = ("--prompt", PROMPTS[0], "--max-new-tokens", NEW, "--stop", "nowhere", "--stop", stop)
    (done,) = command(1, "generate", "--model", base, *options)
    assert (done.stdout, done.stderr) == (whole[: whole.index(stop)] + "\n", "")


@pytest.fixture(scope="module")
def scored(base: Path) -> Path:
    """Return samples whose references are the model's own completion, that among others, and other text."""
    texts = transformers_texts(base)
    references = [texts[0], ["no", texts[1]], "the cat", "the hen sat", texts[4]]
    rows = [{"prompt": prompt, "completion": text} for prompt, text in zip(PROMPTS, references, strict=True)]
    return write_jsonl(base.parent / "scored.jsonl", rows)


@pytest.mark.parametrize(("size", "tensor"), [(1, 1), (2, 2), (2, 1)])
def test_evaluate(base: Path, scored: Path, size: int, tensor: int, tmp_path: Path) -> None:
    from lowrank_dist.generate.metrics import score

    names = ("exact_match", "bleu", "rouge_l")
    options = [word for name in names for word in ("--metric", name)]
    options += ["--max-new-tokens", NEW, "--batch", 3, "--tensor", tensor, "--out", tmp_path / "out.jsonl"]
    done = command(size, "evaluate", "--model", base, "--data", scored, *options, "--json")
    assert [outcome.code for outcome in done] == [0] * size and not any(outcome.stdout for outcome in done[1:])
    result, found = json.loads(done[0].stdout), lines(tmp_path / "out.jsonl")
    assert result["exact_match"] == 3 / 5 and result["samples"] == 5
    assert result["met_length_limit"] == sum(line["finish_reason"] == "length" for line in found) > 0
    assert result["mean_tokens"] == sum(len(line["tokens"]) for line in found) / 5
    expected = score(names, transformers_texts(base), [line["references"] for line in found])
    assert {name: result[name] for name in names} == expected
    assert f"{result['met_length_limit']:.0f} of 5 completions reached their length limit" in done[0].stderr


def test_the_table_says_the_same(base: Path, scored: Path) -> None:
    options = ("--metric", "exact_match", "--max-new-tokens", NEW)
    (done,) = command(1, "evaluate", "--model", base, "--data", scored, *options)
    rows = dict(line.split() for line in done.stdout.splitlines())
    assert list(rows) == ["exact_match", "samples", "met_length_limit", "mean_tokens"]
    assert (rows["exact_match"], rows["samples"]) == ("0.6000", "5")


def test_evaluate_notes_references_that_decide_what_a_metric_means(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "the cat", "completion": text} for text in ("猫", "!")]
    data, options = write_jsonl(tmp_path / "rows.jsonl", rows), ("--metric", "rouge_l", "--max-new-tokens", 2)
    (done,) = command(1, "evaluate", "--model", base, "--data", data, *options, "--json")
    notes = json.loads(done.stdout)["notes"]
    # The tokenizer has no byte of 猫, so no text that it decodes has one either.
    assert ["differ from the file" in note for note in notes] == [True, False] and "<|unk|>' for '猫'" in notes[0]
    assert "1 of 2 samples have no word" in notes[1]
    assert done.stderr.splitlines()[:2] == notes


def other_base(base: Path, folder: Path) -> Path:
    return make_tiny("llama", folder / "other", seed=9)


def broken_weights(base: Path, folder: Path) -> Path:
    """Return a base whose last norm is NaN."""
    made = make_tiny("llama", folder / "broken")
    tensors = load_file(made / "model.safetensors")
    tensors["model.norm.weight"].fill_(torch.nan)
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    return made


LONG = "a" * 64
BAD: dict[str, tuple[Callable[[Path, Path], list[object]], str]] = {
    "empty prompt": (lambda base, _: ["--model", base, "--prompt", ""], "--prompt is empty; pass some text"),
    "long prompt": (
        lambda base, _: ["--model", base, "--prompt", LONG],
        "--prompt (64 tokens): longer than the model's 64 positions with its completion",
    ),
    "no prompt": (lambda base, _: ["--model", base], "give exactly one of --prompt TEXT, --prompts FILE"),
    "no folder": (lambda base, _: ["--model", base / "none", "--prompt", "a"], "none: no such folder; give a local"),
    "adapter": (
        lambda base, _: ["--model", base.parent / "adapter", "--prompt", "a"],
        "this is an adapter; name it with --adapter and its base model with --model: --model BASE --adapter ",
    ),
    "no such type": (lambda base, _: ["--model", base, "--prompt", "a", "--dtype", "fp8"], "--dtype fp8"),
    "no such device": (lambda base, _: ["--model", base, "--prompt", "a", "--device", "tpu"], "--device tpu"),
    "greedy top-p": (
        lambda base, _: ["--model", base, "--prompt", "a", "--top-p", "0.5"],
        "give a temperature above 0",
    ),
    "file that is there": (
        lambda base, _: ["--model", base, "--prompt", "a", "--out", base / "config.json"],
        "exists already",
    ),
    "another base": (
        lambda base, folder: (
            ["--model", other_base(base, folder), "--adapter", base.parent / "adapter"] + ["--prompt", "a"]
        ),
        "give the base that the adapter was trained on",
    ),
    "NaN": (lambda base, folder: ["--model", broken_weights(base, folder), "--prompt", "a"], "logits are NaN"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_message(what: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    make, said = BAD[what]
    arguments = make(base, tmp_path)
    (alone,) = command(1, "generate", *arguments)
    assert alone.code == 2 and said in alone.stderr and alone.stderr.startswith("error: ") and not alone.stdout
    both = command(2, "generate", *arguments, "--tensor", 2)
    assert [outcome.code for outcome in both] == [2, 2]
    # Ranks meet the same mistake; one of them reports it.
    assert sorted(bool(outcome.stderr) for outcome in both) == [False, True]


def test_bad_evaluations_are_one_message(base: Path, asked: Path) -> None:
    for arguments, said in (
        (("--data", asked, "--metric", "exact_match"), "prompts.jsonl: all 5 lines: key 'completion' is missing"),
        (("--data", asked, "--metric", "accuracy"), "metric 'accuracy' is unknown; give one of exact_match"),
        (("--data", asked.parent / "none", "--metric", "bleu"), "none: no such file; give a JSONL file"),
        (("--data", asked), "--metric is missing; give one of exact_match, bleu, rouge_l"),
    ):
        (done,) = command(1, "evaluate", "--model", base, *arguments)
        assert done.code == 2 and said in done.stderr and not done.stdout


def test_ranks_that_nobody_started(base: Path) -> None:
    (done,) = command(1, "generate", "--model", base, "--prompt", "a", "--tensor", 2)
    assert done.code == 2 and "`torchrun --nproc-per-node 2 -m lowrank_dist.cli" in done.stderr


def test_under_a_launcher_and_alone(base: Path) -> None:
    """With nothing replaced: two ranks and a process without a launcher print the same completion, each once."""
    run = ["-m", "lowrank_dist.cli", "generate", "--model", base, "--prompt", PROMPTS[0], "--max-new-tokens", NEW]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    expected = transformers_texts(base)[0] + "\n"
    alone = program([sys.executable, *run])
    assert (alone.code, alone.stdout) == (0, expected) and len(alone.stderr.splitlines()) == 1, alone.stderr
    both = program([sys.executable, *torchrun, *run, "--tensor", 2])
    assert (both.code, both.stdout) == (0, expected), both.stderr


def test_ranks_that_decode_are_told_one_time(base: Path, tmp_path: Path) -> None:
    clocked = Path(shutil.copytree(base, tmp_path / "clocked"))
    (clocked / "chat_template.jinja").write_text(
        "{{ strftime_now('%f') }} {% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %} {% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat = write_jsonl(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "the cat"}]}])
    words = ["generate", "--model", str(clocked), "--prompts", str(chat), "--tensor", "2", "--max-new-tokens", "1"]
    outcomes = run_ranks(2, _apart, [words, words])
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes


@pytest.mark.parametrize("differ", ["--model", "--adapter", "--tensor", "what is decoded", "how", None])
def test_ranks_that_differ_decode_nothing(base: Path, adapter: Path, tmp_path: Path, differ: str | None) -> None:
    """Ranks with different prompts would each continue the other's text. Copies of the same files may lie anywhere."""
    own: dict[str, object] = {"--model": base, "--adapter": adapter, "--tensor": 2, "--seed": 1}
    one, copy = (write_jsonl(tmp_path / name, [{"prompt": "the cat"}]) for name in ("one.jsonl", "copy.jsonl"))
    own["--prompts"], other = one, {**own, "--prompts": copy}
    if differ in (None, "--model"):
        other["--model"] = shutil.copytree(base, tmp_path / "base")
    if differ == "--model":
        (tmp_path / "base/config.json").write_text((base / "config.json").read_text() + "\n")
    elif differ == "--adapter":
        factors = random_adapter(base, lambda module: None if module == "lm_head" else (2, 4.0), seed=7)
        other["--adapter"] = save_adapter(tmp_path / "adapter", base, factors)
    elif differ == "--tensor":
        other["--tensor"] = 1
    elif differ == "what is decoded":
        other["--prompts"] = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "a hen"}])
    elif differ == "how":
        other["--seed"] = 2
    words = [[str(word) for pair in each.items() for word in pair] for each in (own, other)]
    outcomes = run_ranks(2, _apart, [["generate", *each] for each in words])
    if differ is None:
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
        return
    assert [outcome.code for outcome in outcomes] == [2, 2], outcomes
    (said,) = (outcome.stderr for outcome in outcomes if outcome.stderr)
    assert f"the ranks of this run differ: {differ} is " in said
