"""The section eval: a mapping inside a section, and the keys that require one another."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank_dist.config import load_config
from lowrank_dist.errors import ConfigError

BASE = "model: {path: base}\ndata: {train: t, eval: e}\noutput: {dir: run}\n"


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(BASE + text)
    return str(path)


def test_a_mapping_in_a_section(tmp_path: Path) -> None:
    text = (
        "eval:\n  every: 2\n  generate:\n    metrics: [bleu, rouge_l]\n    stop: ['#']\n  best: bleu\n  patience: 3\n"
    )
    config = load_config(write(tmp_path, text))
    asked = config.eval.generate
    assert (asked.metrics, asked.stop, asked.max_new_tokens, asked.batch) == (["bleu", "rouge_l"], ["#"], 128, 8)
    assert (asked.samples, config.eval.best, config.eval.patience) == (None, "bleu", 3)
    line = "eval.generate={metrics: [exact_match], max_new_tokens: 4}"
    over = load_config(write(tmp_path, text), [line, "eval.best=exact_match"])
    assert (over.eval.generate.metrics, over.eval.generate.stop) == (["exact_match"], [])  # replaced, not extended
    for written in (config, over, load_config(write(tmp_path, ""))):
        (tmp_path / "again.yaml").write_text(written.to_yaml())
        assert load_config(tmp_path / "again.yaml") == written
    assert load_config(write(tmp_path, ""), ["eval.generate={}"]).eval.generate.metrics == ["exact_match"]
    assert load_config(write(tmp_path, "eval:\n  generate:\n    # metrics: [bleu]\n")).eval.generate is None


def test_errors_name_the_key_and_its_line(tmp_path: Path) -> None:
    text = (
        "eval:\n  every: 1\n  generate:\n    metrics: [blue]\n    max_tokens: 5\n    batch: 0\n"
        "    stop: ['']\n    lr: 3\n  max_new_tokens: 4\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    keys = "the keys of eval.generate are metrics, max_new_tokens, batch, stop, samples"
    expected = [
        "run.yaml:7: eval.generate.metrics[0]: 'blue' is not valid, input should be 'exact_match', 'bleu' or 'rouge_l'",
        f"run.yaml:8: eval.generate.max_tokens: unknown key; did you mean eval.generate.max_new_tokens? {keys}",
        "run.yaml:9: eval.generate.batch: 0 is not valid",
        "run.yaml:10: eval.generate.stop[0]: '' is not valid",
        "run.yaml:11: eval.generate.lr: unknown key; did you mean train.lr?",
        "run.yaml:12: eval.max_new_tokens: unknown key; did you mean eval.generate.max_new_tokens?",
    ]
    found = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    assert len(found) == len(expected)
    for line in expected:
        assert sum(one.startswith(line) for one in found) == 1, line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["eval.generate=5"], "command line: eval.generate: not a mapping; its keys are metrics, max_new_tokens"),
        (["eval.generate={metrics: []}"], "command line: eval.generate.metrics: [] is not valid"),
        (["eval.generate={samples: 1, samples: 2}"], "command line: eval.generate.samples: given twice"),
        (
            ["eval.generate.batch=2"],
            "command line: eval.generate.batch: keys are written section.key; for a mapping use",
        ),
        (
            ["eval.best=bleu"],
            "command line: eval.best: 'bleu' is not valid, eval.generate is null, so nothing is generated",
        ),
        (["eval.generate={}", "eval.best=bleu"], "'bleu' is not valid, eval.generate.metrics has only exact_match"),
        (["eval.best=accuracy"], "input should be 'loss', 'exact_match', 'bleu' or 'rouge_l'; expected: metric"),
        (["eval.patience=2"], "command line: eval.patience: 2 is not valid, eval.every is null"),
        (["eval.patience=0", "eval.every=1"], "command line: eval.patience: 0 is not valid"),
        (["data.eval=", "eval.generate={}"], "run.yaml: eval.generate is given, but data.eval is null; name a JSONL"),
        (["data.eval=", "eval.every=1", "eval.patience=1"], "eval.patience is given, but data.eval is null; name"),
    ],
)
def test_what_cannot_be_meant(tmp_path: Path, arguments: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, ""), arguments)
    (line,) = str(caught.value).splitlines()
    assert expected in line
