"""Readers of untrusted input: their limits, and that input within the limits means the same as to Python."""

from __future__ import annotations

import json
import os
import re
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_dist.errors import UserError
from lowrank_dist.untrusted import json as reader
from lowrank_dist.untrusted.files import is_valid_path, read_bytes, read_lines, read_text, require_valid_path
from lowrank_dist.untrusted.json import JsonError, parse_json, read_json, read_object, typed_value
from lowrank_dist.untrusted.patterns import Patterns, require_expression

MODULE = "model.layers.11.self_attn.q_proj"
# The pattern that PEFT makes of a key in rank_pattern.
PEFT = r"(.*\.)?({})$"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested more than "),
        ('{"a": ' * 100_000, "nested more than "),
        ("[" * 101 + "]" * 101, "nested more than 100 levels deep"),
        (
            '{"x": 1, "a": [2, {"b": ' + "9" * 5000 + "}]}",
            r"key 'a\[1\].b' holds an integer of 5000 digits at column 25; the limit is 308",
        ),
        ("-" + "9" * 400, "an integer of 400 digits"),
        ('{"a": ' + "9" * 400 + " and no more", "an integer of 400 digits"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 8 of the line"),
        (r'{"a": [{"b": "x\ud800"}]}', r"key 'a\[0\].b' holds an unpaired surrogate"),
        (r'{"\udc00": 1}', "unpaired surrogate"),
        ('"\ufeff', "malformed JSON at column 1"),
        ("\ufeff{}", "malformed JSON"),
        ("", "malformed JSON at column 1"),
        ('{"a": 1', "malformed JSON at column 8: Expecting ',' delimiter"),
        ("{'a': 1}", "malformed JSON"),
        ('{"a": nan}', "malformed JSON"),
        ('{"a": "\x00"}', "malformed JSON at column 8: Invalid control character"),
    ],
)
def test_json_that_is_refused(text: str | bytes, said: str) -> None:
    with pytest.raises(JsonError, match=said):
        parse_json(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"model_max_length": 1000000000000000019884624838656, "x": ' + "9" * 308 + "}",
        '{"time_step_limit": [0.0, Infinity], "x": NaN, "y": 1e999}',
        "[" * 100 + "]" * 100,
        r'{"text": "\ud83d\ude00 \\ud800 \u20ac", "": ""}',
        '{"a": 1, "a": 2}',
    ],
)
def test_json_that_published_files_hold_is_read_as_python_reads_it(text: str) -> None:
    assert repr(parse_json(text)) == repr(json.loads(text)) == repr(parse_json(text.encode()))


@pytest.mark.parametrize("kind", ["a pair", "half a pair", "digits"])
def test_finding_a_fault_takes_no_memory_for_where_it_is_not(kind: str) -> None:
    """A name of 20 kB over 20,000 values took 400 MB; one of 1 MB over a million values would take a terabyte."""
    fault = {"a pair": r'"\ud83d\ude00"', "half a pair": r'"\ud83d"', "digits": "9" * 400}[kind]
    text = '{"' + "A" * 20_000 + '": [' + "0, " * 20_000 + fault + "]}"
    tracemalloc.start()
    try:
        if kind == "a pair":
            assert parse_json(text)["A" * 20_000][-1] == "\U0001f600"
        else:
            with pytest.raises(JsonError, match="^key 'A{99}… holds an"):
                parse_json(text)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_what_is_wrong_is_told_briefly_at_once() -> None:
    began = time.perf_counter()
    assert reader.brief("\x1b" * (32 << 20)) == "'" + (r"\x1b" * 25)[:99] + "…"
    assert time.perf_counter() - began < 2


def test_policies_are_asked_for() -> None:
    with pytest.raises(JsonError, match="key 'a' is given twice"):
        parse_json('[{"a": 1, "a": 2}]', unique=True)
    for text in ("NaN", "-Infinity", "1e999"):
        with pytest.raises(JsonError):
            parse_json(text, finite=True)
    assert parse_json('{"a": 1.5e3}', unique=True, finite=True) == {"a": 1500.0}


def test_a_fault_is_told_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{\n "a": 1,\n "b": ' + "7" * 5000 + "\n}")
    with pytest.raises(UserError, match=r"config\.json:3: key 'b' holds an integer.* at column 7; .*; mend it$"):
        read_object(path, "mend it")
    path.write_text("{\n 1}")
    with pytest.raises(UserError, match=r"config\.json:2: malformed JSON at column 2"):
        read_json(path, "mend it")
    path.write_text("[1]")
    with pytest.raises(UserError, match="expected a JSON object, found list"):
        read_object(path, "mend it")
    assert read_json(path, "mend it") == [1]


@pytest.mark.parametrize(
    ("before", "integer"),
    [
        ('{\n"text \\" : ' + "9" * 400 + '": 1,\n "b": ', "9" * 4301),
        ("[1.5e3, -0." + "9" * 400 + ", " + "9" * 400 + ".5, " + "9" * 400 + "e-2,\n", "-" + "9" * 309),
        ("[1,\n\n", "9" * 400 + "."),
        ("[1, ", "9" * 400 + "e+"),
    ],
    ids=["digits in a text", "floats", "no fraction", "no exponent"],
)
def test_the_place_is_that_of_the_integer(before: str, integer: str) -> None:
    line, column = before.count("\n") + 1, len(before.rpartition("\n")[2]) + 1
    with pytest.raises(JsonError, match=rf"an integer of \d+ digits at column {column};") as caught:
        parse_json(f"{before}{integer}")
    assert caught.value.line == line


def test_a_large_file_is_refused_before_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(UserError, match="larger than 32 MiB, the limit"):
        read_object(path, "mend it")
    with pytest.raises(UserError, match="not a regular file"):
        read_bytes(Path("/dev/zero"), "mend it", largest=10)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="not a regular file"):
        read_bytes(pipe, "mend it", largest=10)
    path.write_bytes(b"0123456789")
    assert read_bytes(path, "", largest=10) == b"0123456789" and read_text(path, "", largest=10) == "0123456789"
    with pytest.raises(UserError, match="9 bytes"):
        read_bytes(path, "mend it", largest=9)


def test_a_long_line_is_refused_before_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"one\n\x0ctwo\xe2\x80\xa8\nthree")
    assert list(read_lines(path, "", longest=8)) == [(1, b"one\n"), (2, b"\x0ctwo\xe2\x80\xa8\n"), (3, b"three")]
    with path.open("ab") as file:
        file.write(b"\n")
        file.truncate(1 << 40)
    lines = read_lines(path, "split it", longest=1 << 20)
    assert [next(lines)[0] for _ in range(3)] == [1, 2, 3]
    with pytest.raises(UserError, match=r"data\.jsonl:4: the line is longer than 1 MiB; split it"):
        next(lines)


def test_paths_that_no_disk_takes_are_errors() -> None:
    for path in (Path("a" * 300), Path("a/" * 3000), Path("x\0y"), Path("/")):
        with pytest.raises((UserError, ValueError), match=r"cannot be read|null byte"):
            read_bytes(path, "mend it", largest=10)
    for text in ("a" * 256, "ä" * 128, "a/" * 2048, "x\0y"):
        with pytest.raises(ValueError, match="path"):
            require_valid_path(text)
        assert not is_valid_path(text)
    assert not is_valid_path("\ud800")
    assert require_valid_path("a" * 255 + "/b") == "a" * 255 + "/b" and is_valid_path("a\udcff")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (str, "x", ["x"]),
        (int, 3, True),
        (int, 3, 3.0),
        (float, 3, "3"),
        (bool, False, 0),
        (list, [], {}),
        (dict, {}, []),
    ],
)
def test_a_value_of_another_kind_is_an_error_with_file_and_key(kind: type, good: object, bad: object) -> None:
    assert typed_value({"key": good}, "key", kind, "x.json") == good
    assert typed_value({}, "key", kind, "x.json") is None and typed_value({"key": None}, "key", kind, "x.json") is None
    with pytest.raises(UserError, match=r"x\.json: key must be .*, not .*; correct it"):
        typed_value({"key": bad}, "key", kind, "x.json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
@settings(max_examples=100, deadline=None)
def test_any_value_is_read_back(value: Any) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert repr(parse_json(text)) == repr(json.loads(text))


@given(st.binary(max_size=80) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_value_or_a_fault(content: bytes) -> None:
    try:
        parse_json(content)
    except JsonError:
        return
    json.loads(content)


# --- regular expressions ---------------------------------------------------------------------------------------------

PUBLISHED = [
    "q_proj",
    r"^(?!.*visual).*(q_proj|k_proj)$",
    r"^(?!.*(visual|merger|lm_head)).*\.(q|k|v|o)_proj$",
    r".*(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp|feed_forward).*?(?:q_proj|k_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|up_proj)))",
    r"model\.layers\.([0-9]|1[0-1])\.self_attn\.(q|v)_proj",
    r"(?i:.*Q_PROJ)",
    r"layers\.(?P<n>\d{1,2})\..*(?<=attn)\.q_proj",
    r".*\.(?!0\.)[0-9]+\..*q_proj$",
    "",
    r"x{,3}.*|[\w.]+",
    # Counts side by side do not multiply the size.
    r"model\.layers\.(?:" + "|".join(rf"{n}\d{{1,2}}" for n in range(1, 40)) + r")\.self_attn\.q_proj",
]


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_published_expressions_mean_what_they_mean_to_re(pattern: str) -> None:
    patterns = Patterns("adapter_config.json")
    paths = [MODULE, "model.visual.blocks.0.attn.q_proj", "model.layers.3.mlp.down_proj", "lm_head", "x.q_proj\n", ""]
    for path in paths:
        assert patterns.fullmatch(pattern, path) == (re.fullmatch(pattern, path) is not None)
        wrapped = re.match(PEFT.replace("{}", pattern), path)
        found = patterns.match(pattern, path, PEFT)
        assert (found and (found.span(), found.groups())) == (wrapped and (wrapped.span(), wrapped.groups()))


PIECES = [
    "a",
    "b",
    ".",
    "_",
    "1",
    ".*",
    "(a|b)",
    "(?!a)",
    "(?=b)",
    "(?<=a)",
    "[a-c]",
    "[^a]",
    r"\.",
    r"\d",
    r"\w",
    "a+?",
]
PIECES += [
    "(?:ab)*",
    "a{2}",
    "b{1,2}",
    "$",
    "^",
    r"\b",
    "(?i:A)",
    "(a)?",
    "|",
    "(?>a*)",
    "b*+",
    r"\B",
    "[.]",
    "x{,2}",
    "(b*)*",
]


@given(st.lists(st.sampled_from(PIECES), max_size=7).map("".join), st.text("ab1._xA\n", min_size=1, max_size=9))
@settings(max_examples=300, deadline=None)
def test_both_engines_agree(pattern: str, text: str) -> None:
    # Not on empty text: before Python 3.14 re's \\B does not match there.
    patterns = Patterns("file")
    assert patterns.fullmatch(pattern, text) == (re.fullmatch(pattern, text) is not None)
    ours, theirs = patterns.match(pattern, text), re.match(pattern, text)
    assert (ours and ours.span()) == (theirs and theirs.span())


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(?i)q_proj", r"not a regular expression: global flags not at the start .*; limit the flags to a group"),
        ("(", "not a regular expression: missing "),
        (")(", "not a regular expression: unbalanced"),
        ("a{99999999999999}", "more than 262144 characters once its repetitions"),
        ("((a{1000}){1000}){1000}", "more than 262144 characters once its repetitions"),
        ("a{1,9" + "9" * 5000 + "}", "more than 262144 characters once its repetitions"),
        ("(?:" * 16 + "a" + "){2}" * 16, "more than 262144 characters once its repetitions"),
        ("(?x)" + "(?:" * 16 + "a" + ")\n{2}" * 16, "more than 262144 characters once its repetitions"),
        ("(?:" + "|".join(f"m{n}" for n in range(2000)) + "){1,65536}", "more than 262144 characters once its"),
        ("(" * 5000 + ")" * 5000, "nested too deeply"),
        ("a" * 20_001, "20001 characters; the limit is 20000"),
        ("a{e<=3}", "a brace that is no repetition count"),
        ("[[:alpha:]]", r"'\[\[:' has a different meaning"),
        (r"(?i:[\u0000-\U0010ffff])", "characters outside ASCII"),
        (r"(?<x>a)", "unknown extension"),
        (r"\p", "bad escape"),
        ("(?R)", "unknown extension"),
    ],
)
def test_expressions_that_are_refused(pattern: str, said: str) -> None:
    with pytest.raises(UserError, match=f"adapter_config.json: rank_pattern: .*{said}"):
        Patterns("adapter_config.json").require(pattern, "rank_pattern", PEFT)


def test_flags_at_the_start_are_taken_where_nothing_precedes_them() -> None:
    require_expression("(?i).*Q_PROJ")
    assert Patterns("file").fullmatch("(?i).*Q_PROJ", MODULE)


@pytest.mark.parametrize("pattern", ["(a|a)*[bc]", "(.|.)*[!Z]"])
def test_an_expression_that_backtracks_ends_in_time(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patterns, "seconds", 0.3)
    patterns = Patterns("adapter_config.json")
    began = time.perf_counter()
    with pytest.raises(UserError, match=r"adapter_config\.json: matching .* take more than 0\.3 s in all; use fewer"):
        patterns.match(pattern, "a" * 60, PEFT)
    # No time is left for any other expression of the same set.
    with pytest.raises(UserError, match="no repetition inside a repetition"):
        patterns.match("q_proj", MODULE, PEFT)
    assert time.perf_counter() - began < 5


def test_the_time_is_that_of_all_expressions_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each expression takes a while to compile, and a file may have a million of them."""
    monkeypatch.setattr(Patterns, "seconds", 0.2)
    patterns = Patterns("adapter_config.json")
    with pytest.raises(UserError, match=r"^adapter_config.json: reading the regular .* take more than 0\.2 s"):
        for number in range(10_000):
            patterns.require(f"(?:a|b|c|{number})?x", "rank_pattern", PEFT)


def test_the_time_is_that_of_all_names_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patterns, "seconds", 0.2)
    patterns = Patterns("adapter_config.json")
    with pytest.raises(UserError, match="no repetition inside a repetition"):
        for number in range(10_000):
            assert patterns.match("(.|.)*[!Z]", f"{number}.aaaaaaaaaaaa", PEFT) is None


@pytest.mark.parametrize("pattern", ["([a-z_.0-9]+)+!", "(x+x+)+y", "((.*)+)+Z"])
def test_expressions_that_hang_re_are_answered(pattern: str) -> None:
    assert Patterns("adapter_config.json").match(pattern, MODULE * 3, PEFT) is None


def test_a_name_that_is_no_modules_is_refused() -> None:
    with pytest.raises(UserError, match=r"\(3000 characters\) is too long"):
        Patterns("file").fullmatch("a*", "a" * 3000)


def test_the_bounds_are_those_of_the_room() -> None:
    assert reader.LARGEST == 32 << 20 and reader.DEEPEST == 100
