"""`lowrank-dist generate` on chats, typed lines and empty completions."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowrank_dist.formats.provenance import read_provenance
from lowrank_dist.merging.merge import merge
from tests.integration.launching import write_jsonl
from tests.integration.test_generate_commands import command
from tests.tiny_adapters import random_adapter, save_adapter
from tests.tiny_models import make_tiny

SHORT = ("--max-new-tokens", 8)
SAID = "trained on chats: prompts go through the chat template (--no-chat: as they are)"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("chats") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    """Return an adapter whose record says that it was trained on chats."""
    factors = random_adapter(base, lambda module: None if module == "lm_head" else (2, 4.0))
    folder = save_adapter(base.parent / "adapter", base, factors)
    provenance = read_provenance(folder)
    assert provenance is not None and provenance.trained_on_chats is None
    record = replace(provenance, training={"data_format": "messages"})
    (folder / "lowrank_dist.json").write_text(record.to_json())
    return folder


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(("size", "tensor"), [(1, 1), (2, 2)])
def test_the_template_is_used_where_the_adapter_was_trained_on_chats(
    base: Path, adapter: Path, tmp_path: Path, size: int, tensor: int
) -> None:
    model = ("--model", base, "--adapter", adapter, "--tensor", tensor, *SHORT)
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "the hen?"}]}])
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"prompt": "the hen?"}])
    (expected,) = rows(command(size, "generate", *model, "--prompts", chats)[0].stdout)
    done = command(size, "generate", *model, "--prompt", "the hen?")
    assert done[0].stdout == expected["completion"] + "\n" and not any(other.stdout for other in done[1:])
    assert done[0].stderr.splitlines()[0] == SAID
    as_it_is = command(size, "generate", *model, "--prompt", "the hen?", "--no-chat")[0]
    assert as_it_is.stdout != done[0].stdout and SAID not in as_it_is.stderr
    for how, found in ((), expected["completion"]), (("--no-chat",), as_it_is.stdout[:-1]):
        (row,) = rows(command(size, "generate", *model, "--prompts", plain, *how)[0].stdout)
        assert row["completion"] == found
    assert row["prompt"] == "the hen?"


def test_a_merged_model_answers_as_its_base_with_the_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(base, adapter, tmp_path / "merged")
    asked = ("--prompt", "the hen?", *SHORT)
    (expected,) = command(1, "generate", "--model", base, "--adapter", adapter, *asked)
    (done,) = command(1, "generate", "--model", tmp_path / "merged", *asked)
    assert done.stdout == expected.stdout and done.stderr.splitlines()[0] == SAID


def test_several_prompts_are_answered_as_those_of_a_file(base: Path, tmp_path: Path) -> None:
    texts = ("the hen?", "the cat")
    given = [word for text in texts for word in ("--prompt", text)]
    (done,) = command(1, "generate", "--model", base, *given, *SHORT)
    file = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in texts])
    assert done.stdout == command(1, "generate", "--model", base, "--prompts", file, *SHORT)[0].stdout
    assert [row["prompt"] for row in rows(done.stdout)] == list(texts)


def test_chat_on_request(base: Path, tmp_path: Path) -> None:
    text = "<|im_start|>user\nthe hen?<|im_end|>\n<|im_start|>assistant\n"
    options = ("generate", "--model", base, *SHORT, "--prompt")
    plain, chat, spelled = (
        command(1, *options, *prompt)[0] for prompt in (("the hen?",), ("the hen?", "--chat"), (text,))
    )
    assert plain.stdout != chat.stdout == spelled.stdout
    bare = Path(shutil.copytree(base, tmp_path / "bare"))
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": None}))
    (refused,) = command(1, "generate", "--model", bare, "--prompt", "a", "--chat")
    assert refused.code == 2 and f"--chat: {bare} has no chat template; use --no-chat" in refused.stderr


def test_an_empty_completion_says_why(base: Path, tmp_path: Path) -> None:
    options = ("--prompt", "the cat", *SHORT)
    (done,) = command(1, "generate", "--model", base, *options)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "the cat"}, {"prompt": "a"}])
    first, other = rows(command(1, "generate", "--model", base, "--prompts", prompts, *SHORT)[0].stdout)
    assert "empty" not in done.stderr
    ends = Path(shutil.copytree(base, tmp_path / "ends"))
    (ends / "generation_config.json").write_text(json.dumps({"eos_token_id": first["tokens"][0]}))
    (done,) = command(1, "generate", "--model", ends, *options)
    assert done.stdout == "\n"
    hint = "; --chat gives the prompt to the chat template\n"
    assert done.stderr.startswith(f"the completion is empty: it ended at once with token {first['tokens'][0]} (")
    assert done.stderr.endswith(hint)
    (done,) = command(1, "generate", "--model", ends, "--prompts", prompts, *SHORT)
    assert other["tokens"][0] != first["tokens"][0], "the second completion would be empty as well"
    assert f"1 of 2 completions are empty: {prompts}:1: it ended at once" in done.stderr
    (done,) = command(1, "generate", "--model", base, *options, "--stop", first["completion"][0])
    assert done.stdout == "\n" and "the completion is empty: it began with a stop text" in done.stderr


@pytest.mark.parametrize(("size", "tensor"), [(1, 1), (2, 2), (2, 1)])
def test_typed_lines_are_a_conversation(base: Path, adapter: Path, tmp_path: Path, size: int, tensor: int) -> None:
    model = ("--model", base, "--adapter", adapter, "--tensor", tensor, "--max-new-tokens", 3)
    turns = [{"role": "user", "content": "hi"}]

    def answer() -> str:
        path = write_jsonl(tmp_path / f"{len(turns)}.jsonl", [{"messages": turns}])
        (row,) = rows(command(size, "generate", *model, "--prompts", path)[0].stdout)
        return str(row["completion"])

    first = answer()
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "er"}]
    second = answer()
    typed = f"hi\n\n{'x' * 70}\ner\n/clear\nhi\n/exit\nhi\n"
    done = command(size, "generate", *model, "--interactive", stdin=typed)
    assert [outcome.code for outcome in done] == [0] * size and not any(outcome.stdout for outcome in done[1:])
    assert done[0].stdout == f"{first}\n{second}\n{first}\n"
    assert "error: --prompt (" in done[0].stderr and "shorten it (/clear forgets what was said)" in done[0].stderr
    # /quit, and no chat.
    (plain,) = command(1, "generate", "--model", base, *SHORT, "--prompt", "hi")
    (done,) = command(1, "generate", "--model", base, *SHORT, "--interactive", stdin="hi\nhi\n/quit\nhi")
    assert done.stdout == plain.stdout * 2


def test_sampled_turns_differ(base: Path) -> None:
    options = ("--model", base, "--temperature", 1.5, "--interactive")
    (done,) = command(1, "generate", *options, *SHORT, stdin="hi\nhi\n")
    one, other = done.stdout.splitlines()
    assert one != other
    assert command(1, "generate", *options, *SHORT, stdin="hi\nhi\n")[0].stdout == done.stdout


def test_one_source_of_prompts(base: Path, tmp_path: Path) -> None:
    for given in ((), ("--prompt", "a", "--interactive")):
        (done,) = command(1, "generate", "--model", base, *given)
        assert done.code == 2 and "give exactly one of --prompt TEXT, --prompts FILE and --interactive" in done.stderr
    (done,) = command(1, "generate", "--model", base, "--interactive", "--out", tmp_path / "out")
    assert done.code == 2 and "--out cannot be used with --interactive" in done.stderr
