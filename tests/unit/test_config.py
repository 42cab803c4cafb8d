"""The config: accepted input, the resolved result, and the messages of errors."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from launch.train import start
from lowrank_dist.config import HELP, Config, load_config, read_arguments
from lowrank_dist.errors import ConfigError
from lowrank_dist.sections.scalars import Dumper, Loader, scalar

METHODS = ("lora", "full", "adapter_h", "adapter_l", "prefix", "prompt")
REQUIRED = {"model": {"path": "base"}, "data": {"train": "train.jsonl"}, "output": {"dir": "run"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(REQUIRED))
    return file


def errors(path: Path, text: str, *overrides: str) -> list[str]:
    """Return the lines of the error, without the file's folder."""
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_arguments([str(path), *overrides])
    return str(caught.value).replace(str(path), path.name).splitlines()


def test_defaults(path: Path) -> None:
    config = load_config(path)
    assert config.model.path == Path("base") and config.model.dtype == "auto" and config.model.vocab_multiple == 128
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (8, 16.0, "all-linear")
    assert (config.parallel.tensor, config.parallel.data, config.parallel.sequence) == (1, None, None)
    assert config.parallel.tensor_size == 1
    assert (config.train.steps, config.train.epochs, config.train.lr, config.train.seed) == (None, 1.0, 2e-4, 42)
    assert (config.engine.zero_stage, config.engine.clip, config.engine.reduce_bucket) == (1, 1.0, None)
    assert (config.engine.kernels, config.engine.lanes) == ("auto", "auto")
    assert (config.eval.every, config.eval.at_start, config.output.save_every) == (None, True, None)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.lr=3e-4", "lora.targets=[q_proj, v_proj]", "parallel.sequence=false"],
        ["--train.lr", "3e-4", "--lora.targets", "[q_proj, v_proj]", "--parallel.sequence", "false"],
        ["--train.lr=3e-4", "--lora.targets=[q_proj, v_proj]", "--local_rank=3", "--parallel.sequence=false"],
    ],
)
def test_overrides(path: Path, arguments: list[str]) -> None:
    for argv in ([str(path), *arguments], [*arguments, str(path)], ["--local_rank=0", str(path), *arguments]):
        config = read_arguments(argv)
        assert config.train.lr == 3e-4 and config.lora.targets == ["q_proj", "v_proj"]
        assert config.parallel.sequence is False


def test_overrides_win_over_the_file_and_later_ones_over_earlier(path: Path) -> None:
    path.write_text(json.dumps({**REQUIRED, "train": {"seed": 1, "steps": 5}}))
    config = load_config(path, ["train.seed=2", "--train.seed", "3", "lora.rank_pattern={q_proj: 4}"])
    assert (config.train.seed, config.train.steps, config.train.epochs) == (3, 5, None)
    assert config.lora.rank_pattern == {"q_proj": 4}
    assert load_config(path, ["train.steps=", "train.epochs=2"]).train.epochs == 2.0


def test_scalars_are_yaml_1_2(path: Path) -> None:
    path.write_text("model: {path: base}\ndata: {train: t}\noutput: {dir: no}\ntrain: {lr: 2e-4, eps: .5}\nlora:\n")
    config = load_config(path)
    assert config.output.dir == Path("no") and config.train.lr == 2e-4 and config.train.eps == 0.5
    # The control: YAML 1.1, as PyYAML reads it, gives a string and a boolean here.
    assert yaml.safe_load("[2e-4, no]") == ["2e-4", False]


def test_config_is_frozen(path: Path) -> None:
    config = load_config(path)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.lr = 1.0  # type: ignore[misc]


def test_all_errors_are_reported_at_once(path: Path) -> None:
    text = (
        "model:\n  path: base\n  dtyp: bf16\nlora:\n  rank: 0\n  lr: 1e-3\n  alpha: '8'\n"
        "parallel:\ndata: 4\nengin:\n  a: 3\n"
        "train:\n  steps: 4\n  epochs: 2\n  global_batch: 7\n  micro_batch: 2\n  lr: .inf\noutput: {plot: no}\n"
    )
    found = errors(path, text, "train.seed=-1", "--eval.every", "2.5", "extra.yaml", "--flag")
    expected = [
        "command line: extra.yaml is a second config file",
        "command line: --flag has no value",
        "run.yaml:3: model.dtyp: unknown key; did you mean model.dtype? the keys of model are path, dtype,",
        "run.yaml:5: lora.rank: 0 is not valid, input should be greater than or equal to 1; expected: rank r",
        "run.yaml:7: lora.alpha: '8' is not valid, input should be a valid number",
        "run.yaml:6: lora.lr: unknown key; did you mean train.lr? the keys of lora are",
        "run.yaml:9: data: not a mapping; its keys are train, eval,",
        "run.yaml:14: train.epochs: 2 is not valid, train.steps (4) and train.epochs both say how long to train: "
        "for epochs, set train.steps=null; expected: passes",
        "run.yaml:16: train.micro_batch: 2 is not valid, train.global_batch (7) is not a multiple of it",
        "run.yaml:17: train.lr: '.inf' is not valid, input should be a valid number",
        "command line: train.seed: -1 is not valid",
        "command line: eval.every: 2.5 is not valid",
        "run.yaml:18: output.dir: required; expected: folder of the run",
        "run.yaml:18: output.plot: 'no' is not valid, input should be a valid boolean",
        "run.yaml:10: engin: unknown key; did you mean engine? the keys at the top level are model, method, lora,",
    ]
    for line in expected:
        assert sum(found_line.startswith(line) for found_line in found) == 1, line
    assert len(found) == len(expected)
    assert all("; " in line for line in found)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.path=", "command line: model.path: None is not valid, a path must be text"),
        ("output.dir=7", "command line: output.dir: 7 is not valid, a path must be text"),
        ('data.eval=""', "command line: data.eval: '' is not valid, a path must be text that is not empty"),
        ("lora.rank=1025", "command line: lora.rank: 1025 is not valid"),
        (f"train.steps={'9' * 5000}", "command line: train.steps: an integer of 5000 digits; the limit is 20"),
        (f"train.steps=-{'9' * 400}", "command line: train.steps: an integer of 400 digits; the limit is 20"),
        (f"lora.alpha_pattern={{q: {'9' * 21}}}", "command line: lora.alpha_pattern.q: an integer of 21 digits"),
        ("lora.rank=2.0", "command line: lora.rank: 2.0 is not valid, input should be a valid integer"),
        ("lora.rank=true", "command line: lora.rank: True is not valid, input should be a valid integer"),
        ("lora.dropout=1", "command line: lora.dropout: 1 is not valid, input should be less than 1"),
        ("lora.alpha=1e999", "command line: lora.alpha: inf is not valid, input should be a finite number"),
        ("lora.targets=[]", "command line: lora.targets: [] is not valid, list should have at least 1 item"),
        ("lora.targets=[a, 5]", "command line: lora.targets[1]: 5 is not valid, input should be a valid string"),
        ("lora.targets=a(", "command line: lora.targets: 'a(' is not valid, not a regular expression: missing )"),
        ("lora.rank_pattern={q: 0}", "command line: lora.rank_pattern.q: 0 is not valid"),
        ("lora.alpha_pattern={'[': 2}", "command line: lora.alpha_pattern.[: '[' is not valid, not a regular"),
        (
            "lora.rank_pattern={'(?i)q': 2}",
            "command line: lora.rank_pattern.(?i)q: '(?i)q' is not valid, not a",
        ),
        (
            "lora.targets=(a{999}){999}",
            "command line: lora.targets: '(a{999}){999}' is not valid, has more than 262144",
        ),
        (
            f"output.dir={'a' * 300}",
            "command line: output.dir: 'aaaaaaaaaaaa...aaaaaaaaaaaaa' is not valid, a name in a path",
        ),
        ("lora.rank_pattern={q: 1, q: 2}", "command line: lora.rank_pattern.q: given twice"),
        ("engine.zero_stage=0", "command line: engine.zero_stage: 0 is not valid, input should be 1 or 2"),
        ("engine.clip=0", "command line: engine.clip: 0 is not valid"),
        (
            "engine.kernels=fast",
            "command line: engine.kernels: 'fast' is not valid; expected: auto (",
        ),
        ("train.lr", "command line: train.lr has no value; write train.lr=VALUE"),
        ("method", "command line: method has no value; write method=VALUE"),
        ("engine.lanes=true", "command line: engine.lanes: True is not valid; expected: on ("),
        ("train.resume=3", "command line: train.resume: 3 is not valid, a path must be text that is not empty"),
        ("output.keep_last=0", "command line: output.keep_last: 0 is not valid"),
        ("train.seed=4294967296", "command line: train.seed: 4294967296 is not valid"),
        ("train.micro-batch=2", "command line: train.micro-batch: unknown key; did you mean train.micro_batch?"),
        ("train=2", "command line: train: keys are written section.key; did you mean data.train?"),
        ("r=4", "command line: r: keys are written section.key; did you mean lora.rank?"),
        ("lora.rank_pattern.q=2", "command line: lora.rank_pattern.q: keys are written section.key"),
        (
            "--num-gpus=2",
            "command line: num-gpus: keys are written section.key; it is an option of the launcher, which",
        ),
        ("train.lr=[1", "command line: train.lr: while parsing a flow sequence"),
        ("train.lr=*x", "command line: train.lr: alias *x is not supported"),
        ("train.lr=!!int x", "command line: train.lr: tag tag:yaml.org,2002:int does not fit 'x'"),
        ("train.lr=!!python/name:os.system x", "command line: train.lr: tag tag:yaml.org,2002:python/name:os.system"),
    ],
)
def test_one_bad_value(path: Path, override: str, expected: str) -> None:
    assert errors(path, path.read_text(), override)[0].startswith(expected)


def test_a_value_that_yaml_does_not_give_is_one_fault(path: Path) -> None:
    faults = {"train.steps": "9" * 5000, "train.lr": "!!int x", "lora.alpha_pattern": "{q: !!float y}"}
    found = errors(path, path.read_text(), *(f"{key}={value}" for key, value in faults.items()))
    assert [line.split(": ")[1] for line in found] == ["train.steps", "train.lr", "lora.alpha_pattern.q"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n", "run.yaml:1: is not a mapping"),
        ("a: b: c\n", "run.yaml:1: mapping values are not allowed here"),
        ("model:\n  path: a\n  path: b\n", "run.yaml:3: model.path: given twice, first at run.yaml:2"),
        ("model:\n  path: a\nmodel:\n  path: b\n", "run.yaml:3: model: given twice, first at run.yaml:1"),
        ("model: &a\n  path: x\ndata: *a\n", "run.yaml:3: alias *a is not supported"),
        ("model: {[a]: b}\n", "run.yaml:1: model: a key is not text"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2: expected a single document in the stream"),
        ("a: \x01\n", "run.yaml: unacceptable character"),
        ("model:\n\tpath: a\n", "run.yaml:2: a tab: YAML is indented with spaces only; correct the YAML"),
        ("model:\n  path: a\n    \tb: c\n", "run.yaml:3: a tab: YAML"),
        ("model:\n  path: [a, @c] # \t\n", "run.yaml:2: while scanning for the next token, found character '@'"),
        ("a:\n  b: " + "[" * 100_000, "run.yaml:2: nested more than 20 levels deep"),
        ("".join(f"{'  ' * depth}a:\n" for depth in range(300)), "run.yaml:20: nested more than"),
        ("model: {path: " + "{a: " * 20 + "1" + "}" * 21, "run.yaml:1: nested more than"),
        ('model: {path: "\\uD800"}', "run.yaml:1: an unpaired surrogate escape"),
        ("model: {path: x}\ndata: {train: x}\ntrain: {seed: " + "9" * 5000 + "}", "run.yaml:3: train.seed: "),
        ("# " + "x" * 300_000, "run.yaml: larger than 262144 bytes, the limit"),
        ("", "run.yaml: model.path: required"),
    ],
)
def test_bad_files(path: Path, text: str, expected: str) -> None:
    assert errors(path, text)[0].startswith(expected)


def test_a_thousand_mistakes_are_told_in_fifty_lines(path: Path) -> None:
    lines = errors(path, "".join(f"key{number}: 1\n" for number in range(1000)))
    assert len(lines) == 51 and lines[-1].endswith("more")


def test_nesting_within_the_bound_is_told_by_its_key(path: Path) -> None:
    (line, *_) = errors(path, "model: {path: " + "{a: " * 15 + "1" + "}" * 16)
    assert "model.path" in line and "nested" not in line


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"model: {path: \xe9}")
    cases = {str(tmp_path / "absent.yaml"): "No such file", str(tmp_path): "Is a directory", str(latin): "not UTF-8"}
    for argument, expected in cases.items():
        with pytest.raises(ConfigError, match=expected):
            load_config(argument, ["train.lr=1"])
    with pytest.raises(ConfigError, match="command line: no config file; give one YAML file"):
        read_arguments(["train.lr=1"])


def test_divisibility_uses_the_default_where_one_is_not_given(path: Path) -> None:
    assert load_config(path, ["train.micro_batch=4"]).train.micro_batch == 4
    (line,) = errors(path, path.read_text(), "train.micro_batch=3")
    assert "train.global_batch (8) is not a multiple of it" in line
    # An invalid batch is reported once.
    (line,) = errors(path, path.read_text(), "train.global_batch=0")
    assert "train.global_batch" in line


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (
            "method: lorra\n",
            [],
            ["run.yaml:4: method: 'lorra' is not valid; did you mean lora? expected: lora, full ("],
        ),
        ("method:\n", [], ["run.yaml:4: method: None is not valid"]),
        ("method: {lora: {rank: 4}}\n", [], ["run.yaml:4: method: {'lora': {'rank': 4}} is not valid"]),
        ("method: [lora]\n", [], ["run.yaml:4: method: ['lora'] is not valid"]),
        ("", ["method=4"], ["command line: method: 4 is not valid"]),
        ("", ["method.rank=4"], ["command line: method.rank: method has no keys; write method=VALUE"]),
        ("method: lora\n", ["method.rank=4"], ["command line: method.rank: method has no keys; write method=VALUE"]),
        (
            "method: full\nlora:\n  rank: 4\n  alpha: 8\n",
            [],
            [
                "run.yaml:7: lora.alpha: not read by method full; remove it, or set method to lora",
                "run.yaml:6: lora.rank: not read by method full; remove it, or set method to lora",
            ],
        ),
        (
            "adapter:\n  bottleneck: 8\n",
            ["prefix.length=4"],
            [
                "run.yaml:5: adapter.bottleneck: not read by method lora; remove it, or set method to adapter_h or",
                "command line: prefix.length: not read by method lora; remove it, or set method to prefix",
            ],
        ),
        ("", ["method=full", "lora.rank=4"], ["command line: lora.rank: not read by method full"]),
        ("lora: {rank: 4}\n", ["method=full", "lora.alpha=4"], ["command line: lora.alpha: not read by method full"]),
        ("lora: 4\n", ["method=full"], ["run.yaml:4: lora: not a mapping"]),
        ("method: prompt\n", ["lora.init_from=x"], ["command line: lora.init_from: not read by method prompt"]),
        ("method: adapter_h\n", ["prompt.length=4"], ["command line: prompt.length: not read by method adapter_h"]),
        ("method: adapter_h\nadapter: {bottleneck: 0}\n", [], ["run.yaml:5: adapter.bottleneck: 0 is not valid"]),
        ("method: prefix\nprefix: {width: 0, length: -1}\n", [], ["run.yaml:5: prefix.length", "run.yaml:5: prefix.w"]),
        ("method: prompt\n", ["prompt.init=zero"], ["command line: prompt.init: 'zero' is not valid"]),
    ],
)
def test_what_a_method_does_not_know(path: Path, text: str, overrides: list[str], expected: list[str]) -> None:
    required = "model: {path: base}\ndata: {train: t}\noutput: {dir: run}\n"
    found = errors(path, required + text, *overrides)
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found


def test_a_word_that_was_meant(path: Path) -> None:
    for override, meant in (
        ("method=lorra", "did you mean lora? expected: lora, full"),
        ("method=Adapter-H", "did you mean adapter_h? expected: "),
        ("engine.kernels=plian", "did you mean plain? expected: "),
        ("adapter.placement=shared", "did you mean sharded? expected: "),
    ):
        (line,) = errors(path, json.dumps(REQUIRED), override)
        assert f"; {meant}" in line
    assert "did you mean" not in errors(path, json.dumps(REQUIRED), "method=3")[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_from_the_command_line_and_its_section(path: Path, method: str) -> None:
    """Empty sections of other methods are ignored, and the resolved config has only the method's own section."""
    path.write_text(json.dumps({**REQUIRED, "method": "lora", "lora": None, "prefix": {}}))
    for arguments in (["method=" + method], ["--method", method], ["--method=" + method]):
        config = load_config(path, arguments)
        assert config.method == method
    sections = {"lora", "adapter", "prefix", "prompt"}
    own = {"adapter"} if method.startswith("adapter") else {method} & sections
    assert sections & config.read_keys().keys() == own == sections & yaml.safe_load(config.to_yaml()).keys()


def test_sections_of_other_methods_are_passed_over_where_the_command_line_names_the_method(path: Path) -> None:
    sections = {"lora": {"rank": 4, "alpha": 8}, "prefix": {"length": 3}, "adapter": {"bottleneck": 12}}
    path.write_text(json.dumps({**REQUIRED, **sections}))
    notes: list[str] = []
    config = load_config(path, ["method=adapter_h"], notes.append)
    assert config.adapter.bottleneck == 12 and config.lora.rank == 8
    expected = "passed over, since method=adapter_h does not read it: prefix (length); lora (rank, alpha)"
    assert notes == [f"{path}: {expected}"]
    # The control: without the override no section is ignored, whatever the file's method.
    for method in ("adapter_h", "lora"):
        found = errors(path, json.dumps({**REQUIRED, **sections, "method": method}))
        assert all("not read by method" in line for line in found) and found


def test_help_says_what_can_be_written(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--help", "-h"):
        assert start([str(path), option]) == 0
    said = capsys.readouterr().out
    assert said == f"{HELP}\n" * 2 and max(map(len, said.splitlines())) <= 120
    commands = [line.split() for line in said.replace("\\\n", " ").splitlines() if "launch/train.py C" in line]
    commands = [shlex.split(" ".join(words)) for words in commands if words[0] != "usage:"]
    assert len(commands) == 8
    for words in commands:
        load_config(path, words[words.index("CONFIG.yaml") + 1 :])


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12)
TRICKY = st.sampled_from(
    ["1e3", "2e-4", "no", "null", "~", "1:30", "0x1f", "1_000", "007", "2024-01-01", ".inf", "*a", " x "]
)
NAMES = TEXT | TRICKY


@st.composite
def configs(draw: st.DrawFn) -> Config:
    micro_batch = draw(st.integers(1, 8))
    train: dict[str, Any] = {
        "lr": draw(st.floats(1e-12, 1e3)),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "micro_batch": micro_batch,
        "global_batch": micro_batch * draw(st.integers(1, 8)),
    }
    train |= draw(st.sampled_from([{}, {"steps": 7}, {"epochs": 0.5}]))
    lora = {
        "rank": draw(st.integers(1, 1024)),
        "alpha": draw(st.floats(1e-3, 1e6)),
        "dropout": draw(st.floats(0, 1, exclude_max=True)),
        "targets": draw(st.lists(NAMES, min_size=1) | st.just(r".*\.(q|v)_proj")),
        "alpha_pattern": draw(st.dictionaries(st.from_regex(r"[a-z0-9_.]{1,8}", fullmatch=True), st.just(2.5))),
    }
    length = st.integers(1, 65536)
    adapter = {"bottleneck": draw(length), "placement": draw(st.sampled_from(["sharded", "replicated"]))}
    own = draw(
        st.sampled_from(
            [
                {"lora": lora},
                {"method": "full"},
                {"method": "adapter_h", "adapter": adapter},
                {"method": "adapter_l", "adapter": adapter},
                {"method": "prefix", "prefix": {"length": draw(length), "width": draw(st.none() | length)}},
                {"method": "prompt", "prompt": {"length": draw(length), "init": "random"}},
            ]
        )
    )
    return Config.model_validate(
        {
            "model": {"path": draw(NAMES)},
            "data": {"train": draw(NAMES), "packing": draw(st.booleans())},
            "output": {"dir": draw(NAMES)},
            "engine": {
                "clip": draw(st.none() | st.floats(1e-6, 1e6)),
                "kernels": draw(st.sampled_from(["auto", "compiled", "plain"])),
                "lanes": draw(st.sampled_from(["auto", "on", "off"])),
            },
            "parallel": {"sequence": draw(st.none() | st.booleans())},
            "train": train,
            **own,
        }
    )


@given(config=configs())
def test_yaml_round_trip(config: Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(file) == config


@given(text=TRICKY | TEXT)
def test_text_comes_back_as_text(text: str) -> None:
    node = yaml.compose(yaml.dump(text, Dumper=Dumper), Loader)
    assert isinstance(node, yaml.ScalarNode) and scalar(node) == text


def test_the_round_trip_needs_its_own_dumper() -> None:
    """The control: a string that PyYAML writes unquoted comes back as a number."""
    node = yaml.compose(yaml.safe_dump("1e3"), Loader)
    assert isinstance(node, yaml.ScalarNode) and scalar(node) == 1000.0


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_the_shipped_configs_are_valid_and_say_how_they_are_launched(path: Path) -> None:
    config = load_config(path)
    assert config.data.eval is None or config.data.train.parent == Path("build/quickstart/data"), (
        "README overrides train"
    )
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"launch/train.py configs/{path.name}" in line for line in header)


def test_a_data_file_that_does_not_exist_is_told_with_its_place(path: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    path.write_text(
        f"model: {{path: b}}\noutput: {{dir: r}}\ndata:\n  train: {tmp_path}/train.jsonl\n  eval: none.jsonl\n"
    )
    arguments = [str(path)]
    with pytest.raises(ConfigError) as caught:
        read_arguments(arguments, require_data=True)
    remedy = "set data.eval=FILE, or data.eval=null for no evaluation"
    assert str(caught.value) == f"{path}:5: data.eval: none.jsonl: no such file; {remedy}"
    with pytest.raises(ConfigError, match="^command line: data.train: absent: no such file; set data.train=FILE$"):
        read_arguments([*arguments, "data.eval=null", "data.train=absent"], require_data=True)
    read_arguments([*arguments, "data.eval=null"], require_data=True)
    read_arguments(arguments)


def test_a_data_file_in_place_of_a_config_is_told(tmp_path: Path) -> None:
    data = tmp_path / "caps.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    with pytest.raises(ConfigError) as caught:
        load_config(data)
    assert f"{data}: a data file, not a config; " in str(caught.value)
    assert f"`lowrank-dist data CONFIG data.train={data}`" in str(caught.value)
