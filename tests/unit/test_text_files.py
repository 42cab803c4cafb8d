"""Tokenizer, chat template and end-of-text ids of the training go into checkpoints, merges and exports."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from lowrank_dist.checkpoint.folder import export
from lowrank_dist.cli.main import app
from lowrank_dist.data.dataset import load_dataset
from lowrank_dist.data.tokenizer import load_tokenizer
from lowrank_dist.errors import UserError
from lowrank_dist.formats.provenance import read_provenance
from lowrank_dist.formats.text_files import (
    TOKENIZER_FILES,
    TextFiles,
    locate_tokenizer,
    merged_text_files,
    note_on_adapter_tokenizer,
    note_on_base_tokenizer,
    read_tokenizer,
    same_tokenizer,
    tokenizer_of_adapter,
    unknown_end_ids,
)
from lowrank_dist.generate.texts import stop_tokens
from lowrank_dist.merging.merge import merge
from lowrank_dist.merging.options import OutputFormat, WeightedAdapter
from lowrank_dist.methods.files import VLLM
from tests import tiny_tokenizers as tiny
from tests.integration.launching import write_jsonl
from tests.tiny_adapters import random_adapter, save_adapter
from tests.tiny_models import EOS, VOCAB, make_tiny

IM_END = 4  # in make_tiny's tokenizer, whose template ends turns with it


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def base(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "base"))


def trained(folder: Path, base: Path, text: TextFiles | None, seed: int = 0) -> Path:
    """Save an adapter of the base with `text` beside it, as at the end of a run."""
    save_adapter(folder, base, random_adapter(base, seed=seed))
    if text is not None:
        text.write(folder)
        provenance = read_provenance(folder)
        assert provenance is not None
        new = replace(provenance, training={"new_ends": unknown_end_ids(base, text.ends)})
        (folder / "lowrank_dist.json").write_text(new.to_json())
    return folder


def settings(folder: Path, name: str = "generation_config.json") -> dict[str, Any]:
    found = json.loads((folder / name).read_text())
    assert isinstance(found, dict)
    return found


def edit(path: Path, **changes: Any) -> None:
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def ends_in_transformers(folder: Path) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    found = model.generation_config.eos_token_id
    return found if isinstance(found, list) else [found]


# --- end-of-text ids ------------------------------------------------------------------------------------------------


def test_a_data_set_says_what_its_samples_end_in(llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(llama)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a <|eos|> b"}]
    chats = load_dataset(write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}] * 2), tokenizer, 99, VOCAB)
    rows = [{"prompt": "hi", "completion": "a<|im_end|>b"}]
    texts = load_dataset(write_jsonl(tmp_path / "b.jsonl", rows), tokenizer, 99, VOCAB)
    assert (chats.ends, texts.ends) == ((IM_END,), (EOS,))


def derived(base: Path) -> None:
    """The file as save_pretrained derives it from config.json, whose eos_token_id transformers would use."""
    assert settings(base)["_from_model_config"] is True


def several(base: Path) -> None:
    edit(base / "generation_config.json", eos_token_id=[9, EOS], temperature=0.5)


def silent(base: Path) -> None:
    edit(base / "generation_config.json", eos_token_id=None)


def in_config_alone(base: Path) -> None:
    (base / "generation_config.json").unlink()


def nowhere(base: Path) -> None:
    (base / "generation_config.json").unlink()
    edit(base / "config.json", eos_token_id=None)


@pytest.mark.parametrize(
    ("make", "known"), [(derived, [1]), (several, [9, 1]), (silent, [1]), (in_config_alone, [1]), (nowhere, [])]
)
def test_a_merged_model_ends_where_it_was_trained_to(
    base: Path, tmp_path: Path, make: Callable[[Path], None], known: list[int]
) -> None:
    make(base)
    text = TextFiles.of_run(base, base, [IM_END])
    adapter = trained(tmp_path / "adapter", base, text)
    report = merge(base, adapter, tmp_path / "out")
    # The EOS of the copied tokenizer ends a text too.
    assert ends_in_transformers(tmp_path / "out") == [*known, IM_END, *([] if known else [EOS])]
    assert any(f"eos_token_id has {IM_END}" in line for line in report.notes)
    assert {*known, IM_END} <= stop_tokens(base, load_tokenizer(base), adapter)
    # Full fine-tuning writes the base's files first, then these.
    whole = Path(shutil.copytree(base, tmp_path / "whole"))
    text.write(whole)
    assert ends_in_transformers(whole) == [*known, IM_END]
    # Other settings stay. Without the trained ids the merged model would not stop.
    before = settings(base) if (base / "generation_config.json").is_file() else {}
    assert all(settings(whole)[key] == before[key] for key in {"temperature", "pad_token_id"} & before.keys())
    merge(base, trained(tmp_path / "plain", base, None), tmp_path / "control")
    if known:
        assert IM_END not in ends_in_transformers(tmp_path / "control")
    assert load_tokenizer(tmp_path / "out").eos_id == EOS


def test_nothing_changes_where_nothing_is_missing(base: Path, tmp_path: Path) -> None:
    adapter = trained(tmp_path / "adapter", base, TextFiles.of_run(base, base, [EOS]))
    assert (adapter / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    report = merge(base, adapter, tmp_path / "out")
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path
    assert not any("eos_token_id" in line or "tokenizer" in line for line in report.notes)
    in_config_alone(base)
    assert TextFiles.of_run(base, base, [EOS]).names == ("tokenizer.json", "tokenizer_config.json")


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def other_tokenizer(folder: Path) -> Path:
    """Write a tokenizer with ids below VOCAB, another template and another EOS."""
    made = make_tiny("llama", folder)
    edit(folder / "tokenizer_config.json", chat_template="{{ messages }}", eos_token="<|im_end|>")
    return made


def test_the_tokenizer_that_was_trained_with_is_in_the_merged_model_alone(base: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tekken.json"):
        (base / name).write_text("{}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tool_use.jinja").write_text("base's")
    other = other_tokenizer(tmp_path / "other")
    (other / "chat_template.jinja").write_text("other's")
    adapter = trained(tmp_path / "adapter", base, TextFiles.of_run(other, base, [IM_END]))
    assert (adapter / "chat_template.jinja").read_text() == "other's" and not (adapter / "vocab.json").exists()
    report = merge(base, adapter, tmp_path / "out")
    assert f"the tokenizer or chat template is not that of {base}" in report.notes
    found = {name for name in TOKENIZER_FILES if (tmp_path / "out" / name).exists()}
    assert found == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert not (tmp_path / "out/additional_chat_templates").exists()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert (theirs.chat_template, theirs.eos_token_id) == ("other's", IM_END)
    # Control: a tokenizer equal to the base's changes nothing.
    same = trained(tmp_path / "same", base, TextFiles.of_run(base, base, [EOS]))
    merge(base, same, tmp_path / "kept")
    assert (tmp_path / "kept/additional_chat_templates/tool_use.jinja").read_text() == "base's"
    assert (tmp_path / "kept/vocab.json").exists()


def test_a_tokenizer_beside_a_foreign_adapter_goes_along_with_its_end(base: Path, tmp_path: Path) -> None:
    adapter = trained(tmp_path / "adapter", base, None)
    (adapter / "lowrank_dist.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(other_tokenizer(tmp_path / "other") / name, adapter / name)
    merge(base, adapter, tmp_path / "out")
    assert ends_in_transformers(tmp_path / "out") == [EOS, IM_END]
    assert settings(tmp_path / "out", "tokenizer_config.json")["eos_token"] == "<|im_end|>"


def test_different_tokenizers_need_one_that_is_given(base: Path, tmp_path: Path) -> None:
    other = other_tokenizer(tmp_path / "other")
    text = TextFiles.of_run(base, base, [EOS])
    first = trained(tmp_path / "first", base, text)
    second = trained(tmp_path / "second", base, TextFiles.of_run(other, base, [IM_END]), seed=1)
    adapters = [WeightedAdapter(first), WeightedAdapter(second)]
    with pytest.raises(UserError, match="have different tokenizers or chat templates; .*--tokenizer DIR"):
        merge(base, adapters, tmp_path / "out")
    merge(base, adapters, tmp_path / "out", output_format=OutputFormat(tokenizer=other))
    assert same_tokenizer(read_tokenizer(tmp_path / "out"), read_tokenizer(other))
    merge(base, first, tmp_path / "over", output_format=OutputFormat(tokenizer=other))
    assert same_tokenizer(read_tokenizer(tmp_path / "over"), read_tokenizer(other))
    with pytest.raises(UserError, match="nowhere: no tokenizer; give a folder with"):
        merge(base, first, tmp_path / "never", output_format=OutputFormat(tokenizer=tmp_path / "nowhere"))
    # A tokenizer with more tokens than the model has rows. An added token beyond the rows is common.
    wide = settings(other, "tokenizer.json")
    wide["model"]["vocab"]["zq"] = VOCAB
    big = Path(shutil.copytree(other, tmp_path / "big"))
    (big / "tokenizer.json").write_text(json.dumps(wide))
    with pytest.raises(UserError, match=f"--tokenizer .*big: its vocabulary has ids up to {VOCAB}, but the model has"):
        merge(base, first, tmp_path / "never", output_format=OutputFormat(tokenizer=big))
    del wide["model"]["vocab"]["zq"]
    wide["added_tokens"].append({**wide["added_tokens"][0], "id": VOCAB, "content": "<pad>"})
    (big / "tokenizer.json").write_text(json.dumps(wide))
    merge(base, first, tmp_path / "padded", output_format=OutputFormat(tokenizer=big))
    # Controls: an adapter without tokenizer files, one written by another library, and one with padding set.
    third = trained(tmp_path / "third", base, None, seed=2)
    spelled = trained(tmp_path / "spelled", base, text, seed=3)
    (spelled / "tokenizer.json").write_text(json.dumps(settings(base, "tokenizer.json") | {"padding": {"x": 1}}))
    (spelled / "chat_template.jinja").write_text(settings(base, "tokenizer_config.json")["chat_template"])
    edit(spelled / "tokenizer_config.json", chat_template=None, padding_side="left")
    assert merged_text_files([first, third, spelled], None, VOCAB).ends[0] == EOS
    options = ["--base", base, "--adapter", first, "--out", tmp_path / "told", "--tokenizer", other]
    done = CliRunner().invoke(app, ["merge", *map(str, options)])
    assert done.exit_code == 0 and "the tokenizer or chat template is not that of" in done.output


def older(folder: Path) -> Path:
    """Rewrite tokenizer.json like files published before 2024: merges as strings, fewer keys."""
    file = folder / "tokenizer.json"
    definition = json.loads(file.read_text())
    definition["model"]["merges"] = [" ".join(pair) for pair in definition["model"]["merges"]]
    steps = [definition["pre_tokenizer"], *definition["pre_tokenizer"].get("pretokenizers", ())]
    defaults = {"type": "BPE", "ignore_merges": False, "byte_fallback": False, "fuse_unk": False, "use_regex": True}
    for step in (definition["model"], *steps):
        for key, value in defaults.items():
            if step.get(key) == value:
                del step[key]
        if "prepend_scheme" in step:
            step["add_prefix_space"] = True
    file.write_text(json.dumps(definition))
    return folder


@pytest.mark.parametrize("make", [tiny.byte_level, partial(tiny.dummy_prefix, scheme="first")], ids=["bytes", "space"])
def test_a_tokenizer_that_was_saved_anew_is_the_same(make: Callable[..., Path], tmp_path: Path) -> None:
    """Saved by transformers, as PEFT and TRL do beside adapters. Controls: a change of every meaningful field."""
    old = older(make(tmp_path / "old", template=tiny.CHATML))
    hf = PreTrainedTokenizerFast.from_pretrained(old, local_files_only=True)
    hf.save_pretrained(tmp_path / "new")
    one, other = read_tokenizer(old), read_tokenizer(tmp_path / "new")
    assert one["tokenizer.json"] != other["tokenizer.json"] and same_tokenizer(one, other)
    definition = json.loads(other["tokenizer.json"])
    model, (step, *_) = definition["model"], definition["pre_tokenizer"].get("pretokenizers", [definition["model"]])
    flag = "use_regex" if "use_regex" in step else "byte_fallback"
    merges = [*model["merges"][1:], model["merges"][0]]
    for part, key, value in ((model, "merges", merges), (model, "ignore_merges", True), (step, flag, not step[flag])):
        before, part[key] = part[key], value
        assert not same_tokenizer(one, {**other, "tokenizer.json": json.dumps(definition).encode()}), key
        part[key] = before
    assert same_tokenizer(one, {**other, "tokenizer.json": json.dumps(definition).encode()})


SLOW = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"pad_token": "<unk>", "model_max_length": 9, "add_bos_token": True}, True),
        ({"chat_template": "{{ messages }}"}, False),
        ({"eos_token": "<unk>"}, False),
        ({"add_bos_token": False}, False),
        ({"additional_special_tokens": ["<new>"]}, False),
    ],
)
def test_a_model_beside_an_adapter_does_not_replace_the_tokenizer_made_of_it(
    base: Path, changes: dict[str, Any], same: bool, tmp_path: Path
) -> None:
    """Adapters of 2023 have this: they were trained with LlamaTokenizer on tokenizer.model."""
    for name in TOKENIZER_FILES:
        (base / name).unlink(missing_ok=True)
    adapter = save_adapter(tmp_path / "adapter", base, random_adapter(base))
    for folder, said in ((base, SLOW), (adapter, SLOW | changes)):
        tiny.sentencepiece(folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
    AutoTokenizer.from_pretrained(base, local_files_only=True).save_pretrained(base)
    merge(base, adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").is_file() == same
    # `generate` and `evaluate` read this tokenizer; tokenizer.model alone supports fewer texts.
    assert (
        tokenizer_of_adapter(adapter, base) == (base if same else adapter) and tokenizer_of_adapter(None, base) == base
    )
    (adapter / "tokenizer.model").write_bytes(b"another")
    assert not same_tokenizer(read_tokenizer(base), read_tokenizer(adapter))


FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
BESIDE: dict[str, tuple[str, Any]] = {
    "split_special_tokens": ("tokenizer_config.json", True),
    "added_tokens_decoder": ("tokenizer_config.json", {"2": {**FLAGS, "content": "<|im_end|>", "lstrip": True}}),
    "added_tokens_decoder, new": ("tokenizer_config.json", {"500": {**FLAGS, "content": "<new>"}}),
    "extra_special_tokens": ("tokenizer_config.json", ["<new>"]),
    "additional_special_tokens": ("special_tokens_map.json", ["<new>"]),
    "pad_token": ("tokenizer_config.json", "<new>"),
    "<new>": ("added_tokens.json", 500),
    # Controls that change no id.
    "pad_token, known": ("tokenizer_config.json", "<|endoftext|>"),
    "added_tokens_decoder, known": ("tokenizer_config.json", {"2": {**FLAGS, "content": "<|im_end|>"}}),
    "extra_special_tokens, known": ("tokenizer_config.json", ["<|im_end|>"]),
    "model_max_length": ("tokenizer_config.json", 9),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_lies_beside_tokenizer_json_makes_another_tokenizer_where_it_makes_other_ids(
    case: str, tmp_path: Path
) -> None:
    folder, (name, value), text = (
        tiny.byte_level(tmp_path / "one", template=tiny.CHATML),
        BESIDE[case],
        "a <|im_end|>b<new>",
    )
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (other / name).touch()
    (other / name).write_text(json.dumps(json.loads((other / name).read_text() or "{}") | {case.split(",")[0]: value}))
    alike = load_tokenizer(folder).encode([text]) == load_tokenizer(other).encode([text])
    assert same_tokenizer(read_tokenizer(folder), read_tokenizer(other)) == alike
    assert alike == (case.endswith("known") or case == "model_max_length")


def test_a_run_that_starts_from_an_adapter_says_that_its_tokenizer_is_another(base: Path, tmp_path: Path) -> None:
    other = other_tokenizer(tmp_path / "other")
    adapter = trained(tmp_path / "adapter", base, TextFiles.of_run(other, base, [EOS]))
    (line,) = note_on_adapter_tokenizer(adapter, base)
    assert line.startswith(
        f"{adapter}: trained with another tokenizer or chat template than this run's {base}; to keep"
    )
    assert note_on_adapter_tokenizer(adapter, other) == note_on_adapter_tokenizer(adapter, adapter) == []
    assert (
        note_on_adapter_tokenizer(trained(tmp_path / "plain", base, None), base)
        == note_on_adapter_tokenizer(tmp_path / "gone", base)
        == []
    )


def test_a_run_with_the_tokens_of_another_model_says_so(base: Path, tmp_path: Path) -> None:
    other = other_tokenizer(tmp_path / "other")
    assert note_on_base_tokenizer(other, base) == [], "another template and another end, of the same tokens"
    found = settings(other, "tokenizer.json")
    vocabulary = found["model"]["vocab"]
    words, ids = list(vocabulary), list(vocabulary.values())
    found["model"]["vocab"] = dict(zip(words, ids[::-1], strict=True))
    (other / "tokenizer.json").write_text(json.dumps(found))
    (line,) = note_on_base_tokenizer(other, base)
    assert line.startswith(f"data.tokenizer: {other} maps text to other token ids than {base}")
    (base / "tokenizer.json").unlink()
    assert note_on_base_tokenizer(other, base) == []


def sentencepiece_beside_json(folder: Path) -> Path:
    tiny.byte_level(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    return tiny.sentencepiece(folder)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (tiny.byte_level, {"tokenizer.json", "tokenizer_config.json"}),
        (lambda folder: tiny.byte_level(folder) / "tokenizer.json", {"tokenizer.json", "tokenizer_config.json"}),
        (lambda folder: tiny.sentencepiece(folder).parent, {"tokenizer.model"}),
        (sentencepiece_beside_json, {"tokenizer.model", "tokenizer_config.json"}),
        (lambda folder: tiny.sentencepiece(folder).rename(folder / "spm.model"), {"tokenizer.model"}),
        (lambda folder: sentencepiece_beside_json(folder).parent, {*TOKENIZER_FILES[:3]}),
    ],
)
def test_the_files_are_those_that_were_read(make: Callable[[Path], Path], names: set[str], tmp_path: Path) -> None:
    path = make(tmp_path / "tokenizer")
    assert locate_tokenizer(path) == load_tokenizer(path).path
    files = read_tokenizer(path)
    assert files.keys() == names
    copied = tmp_path / "copied"
    copied.mkdir()
    TextFiles(files, ()).write(copied)
    text = ["the dog <|im_end|> jumps"]
    assert load_tokenizer(copied).encode(text) == load_tokenizer(path).encode(text)


def test_no_link_brings_a_file_from_elsewhere(base: Path, tmp_path: Path) -> None:
    farm = tmp_path / "farm"
    farm.mkdir()
    for path in base.iterdir():
        (farm / path.name).symlink_to(path)
    assert read_tokenizer(farm) == read_tokenizer(base)  # a folder of links to another model's files
    (tmp_path / "secret").write_text("{}")
    (farm / "vocab.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"vocab.json: a link to a file outside its folder \(.*secret\); copy the file"):
        read_tokenizer(farm)
    (base / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json of the tokenizer is not valid JSON"):
        same_tokenizer(read_tokenizer(base), {})


# --- export ----------------------------------------------------------------------------------------------------------


def test_an_export_has_the_tokenizer_and_vllm_must_end_its_texts(base: Path, tmp_path: Path) -> None:
    adapter = trained(tmp_path / "adapter", base, TextFiles.of_run(base, base, [IM_END]))
    export(adapter, tmp_path / "plain")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (adapter / name).read_bytes()
    for at_hand in (True, False):
        if not at_hand:
            edit(adapter / "lowrank_dist.json", base="elsewhere")
        with pytest.raises(UserError, match="its training texts end in token 4 .'<.im_end.>'., which is not in eos_to"):
            export(adapter, tmp_path / "out", target=VLLM)
    edit(adapter / "lowrank_dist.json", base=str(base))
    edit(base / "generation_config.json", eos_token_id=[EOS, IM_END])
    export(adapter, tmp_path / "served", target=VLLM)
    # Control: an end that the base has.
    export(trained(tmp_path / "usual", base, TextFiles.of_run(base, base, [EOS])), tmp_path / "usually", target=VLLM)


def test_vllm_reads_the_tokenizer_of_the_base(base: Path, tmp_path: Path) -> None:
    other = other_tokenizer(tmp_path / "other")
    adapter = trained(tmp_path / "adapter", base, TextFiles.of_run(other, base, [EOS]))
    with pytest.raises(UserError, match="trained with another tokenizer or chat template than that of .*base, which"):
        export(adapter, tmp_path / "out", target=VLLM)


def test_vllm_reasons_of_weights_and_of_texts_come_together(base: Path, tmp_path: Path) -> None:
    other = other_tokenizer(tmp_path / "other")
    text = TextFiles.of_run(other, base, [IM_END])
    adapter = trained(tmp_path / "adapter", base, text)
    text.write(
        save_adapter(tmp_path / "large", base, random_adapter(base, lambda m: (24 if "1.mlp.d" in m else 2, 4.0)))
    )
    shutil.copyfile(adapter / "lowrank_dist.json", tmp_path / "large/lowrank_dist.json")
    with pytest.raises(UserError) as refusal:
        export(tmp_path / "large", tmp_path / "out", target=VLLM)
    assert str(refusal.value).count("not exported for vLLM") == 1
    for reason in (
        "its largest rank, 24 (of model.layers.1.mlp.down_proj), is above vLLM's default",
        f"its training texts end in token {IM_END} ('<|im_end|>')",
        "it was trained with another tokenizer or chat template",
    ):
        assert reason in str(refusal.value)


def test_the_lines_of_the_card_end_texts_as_trained(base: Path, tmp_path: Path) -> None:
    export(trained(tmp_path / "adapter", base, TextFiles.of_run(base, base, [IM_END])), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    lines = card[card.index("    from peft") :].split("\n\n")[0]
    names: dict[str, Any] = {}
    exec(textwrap.dedent(lines).replace("BASE", str(base)).replace("ADAPTER", str(tmp_path / "out")), names)
    assert names["model"].generation_config.eos_token_id == [EOS, IM_END]
    assert names["tokenizer"].chat_template == AutoTokenizer.from_pretrained(base).chat_template
    # The control: PEFT alone.
    assert AutoModelForCausalLM.from_pretrained(base).generation_config.eos_token_id == EOS
