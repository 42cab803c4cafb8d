"""JSONL reading: accepted rows, and every kind of mistake named with its line and key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowrank_dist.data.formats import MAX_PROBLEMS, Problem, Use, read_jsonl
from lowrank_dist.errors import UserError

GOOD = '{"prompt": "a", "completion": "b"}'
CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def write(tmp_path: Path, *lines: str | bytes) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_completions_keep_their_line_numbers_over_blank_lines(tmp_path: Path) -> None:
    records = read_jsonl(write(tmp_path, "", GOOD, "  \r", '{"prompt": "", "completion": "x\\u2028y"}\r', ""))
    assert records.kind == "completion" and not records.conversations
    assert [(r.line, r.prompt, r.completion) for r in records.completions] == [(2, "a", "b"), (4, "", "x\u2028y")]


def test_a_raw_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    records = read_jsonl(write(tmp_path, '{"prompt": "a\u2028b\u0085c", "completion": "d"}', GOOD))
    assert [r.line for r in records.completions] == [1, 2]
    assert records.completions[0].prompt == "a\u2028b\u0085c"


def test_conversations(tmp_path: Path) -> None:
    records = read_jsonl(write(tmp_path, CHAT, CHAT))
    assert records.kind == "messages" and not records.completions
    assert records.conversations[1].line == 2
    assert records.conversations[0].messages[1] == {"role": "assistant", "content": "b"}


def test_a_byte_order_mark_is_taken_off(tmp_path: Path) -> None:
    assert read_jsonl(write(tmp_path, b"\xef\xbb\xbf" + GOOD.encode())).completions[0].prompt == "a"


def test_extra_keys_are_counted(tmp_path: Path) -> None:
    """Unknown keys are counted. Keys with information about the sample, and null values, are ignored silently."""
    more = '{"id": 3, "source": "x", "prompt": "a", "completion": "b", "colour": false, "other": null, "z": ""}'
    records = read_jsonl(write(tmp_path, GOOD, more))
    assert records.ignored_keys == {"colour": 1, "z": 1}


@pytest.mark.parametrize(
    "line",
    [
        # Null and empty columns, as exported tables have them, and keys that ask for the default behaviour.
        '{"prompt": "a", "completion": "b", "input": "", "tools": null, "chat_template_kwargs": {}, "system": null}',
        '{"prompt": "a", "completion": "b", "label": true, "weight": 1.0, "images": []}',
        '{"prompt": "a", "completion": "b", "source": "x", "score": 4.5, "meta": {"a": 1}, "id": 7}',
        '{"messages": [{"role": "assistant", "content": "b", "weight": 1, "tool_calls": null, "id": 3}], "tools": []}',
    ],
)
def test_keys_without_effect_pass(tmp_path: Path, line: str) -> None:
    records = read_jsonl(write(tmp_path, line))
    assert len(records.completions) + len(records.conversations) == 1 and not records.ignored_keys


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ('{"prompt": "a", "completion": ', ["malformed JSON at column 31", "one JSON object per line"]),
        ("[" * 100_000, ["nested more than "]),
        ('["a"]', ["JSON array where an object"]),
        ("7", ["JSON number where an object"]),
        ('{"prompt": "a"}', ["'completion' is missing"]),
        ('{"prompt": "a", "Completion": "b"}', ["'completion' is missing", "rename 'Completion' to 'completion'?"]),
        ('{"completion": "a"}', ["'prompt' is missing"]),
        ('{"prompt": 3, "completion": "b"}', ["'prompt' is a JSON number", "write a string"]),
        ('{"prompt": "a", "completion": null}', ["'completion' is a JSON null"]),
        ('{"prompt": "a", "completion": ["b"]}', ["'completion' is a JSON array", "only for evaluation, data.eval"]),
        ('{"prompt": "a", "completion": ""}', ["'completion' is empty"]),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', ["'prompt' is given twice"]),
        ('{"prompt": "\\ud83d", "completion": "c"}', ["'prompt'", "unpaired surrogate"]),
        ('{"promt": "a", "complete": "b"}', ["'promt': did you mean 'prompt'?"]),
        (
            '{"conversations": []}',
            ["no key 'prompt', 'completion' or 'messages'", "'conversations': did you mean 'messages'?"],
        ),
        ('{"prompt": "a", "completion": "b", "messages": []}', ["both 'completion' and 'messages'"]),
        (
            '{"prompt": "a", "completion": "b", "tools": [{}]}',
            ["'tools' is not supported, though the model would have to see it"],
        ),
        ('{"prompt": "a", "completion": "b", "label": false}', ["'label' is not supported, though it would change"]),
        ('{"prompt": "a", "completion": "b", "label": 1}', ["'label' is not supported, though it would change"]),
        ('{"prompt": "a", "completion": "b", "weight": 0}', ["'weight' is not supported, though it would change"]),
        (
            '{"prompt": "a", "completion": "b", "input": "c"}',
            ["'input' is not supported, though the model would have to see it"],
        ),
        (
            CHAT[:-1] + ', "chat_template_kwargs": {"enable_thinking": false}}',
            ["'chat_template_kwargs' is not supported"],
        ),
        (CHAT[:-1] + ', "enable_thinking": false}', ["'enable_thinking' is not supported, though the model"]),
        ('{"messages": []}', ["'messages' is an empty array"]),
        ('{"messages": "hi"}', ["'messages' is a JSON string"]),
        ('{"messages": ["hi"]}', ["'messages[0]' is a JSON string"]),
        ('{"messages": [{"role": "user"}]}', ["'messages[0].content' is missing"]),
        ('{"messages": [{"content": "x"}]}', ["'messages[0].role' is missing"]),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', ["'messages[0].content' is a JSON array"]),
        (
            '{"messages": [{"role": "human", "content": "x"}]}',
            ["'messages[0].role' is 'human'; for 'human' write 'user'"],
        ),
        ('{"messages": [{"role": "gpt", "content": "x"}]}', ["for 'gpt' write 'assistant'"]),
        (
            '{"messages": [{"role": "tool", "content": "x"}]}',
            ["'messages[0].role' is 'tool'", "system, user, assist"],
        ),
        (
            '{"messages": [{"role": "assistant", "content": " \\n"}]}',
            ["'messages[0].content' of the assistant is empty"],
        ),
        ('{"messages": [{"role": "assistant", "content": "x", "weight": 0}]}', ["the key 'weight'"]),
        ('{"messages": [{"role": "user", "content": "x", "name": "y"}]}', ["the key 'name'"]),
        ('{"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}', ["the key 'tool_calls'"]),
        (b'{"prompt": "\xff\xfe", "completion": "b"}', ["not UTF-8 at byte 13", "save the file as UTF-8"]),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str | bytes, fragments: list[str]) -> None:
    path = write(tmp_path, "", line)
    with pytest.raises(UserError) as caught:
        read_jsonl(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    for fragment in fragments:
        assert fragment in message


MANY = ", ".join(f'"k{n:x}": 0' for n in range(150_000))


@pytest.mark.parametrize(
    "line",
    [
        "{" + MANY + "}",
        '{"prompt": "a", ' + MANY + "}",
        '{"messages": [{"role": "user", ' + MANY + "}]}",
        '{"messages": [{"role": "' + "x" * 10**6 + '", "content": "y"}]}',
        '{"messages": [{"role": "user", "content": "y", "' + "x" * 10**6 + '": 1}]}',
        '{"' + "x" * 10**6 + '": 1}',
    ],
    ids=["no format", "no completion", "no content", "role", "unknown key", "long key"],
)
def test_a_bad_line_is_named_briefly_however_long_it_is(tmp_path: Path, line: str) -> None:
    with pytest.raises(UserError) as caught:
        read_jsonl(write(tmp_path, line))
    assert len(str(caught.value)) < 2000


def test_where_texts_are_judged_a_line_may_have_several_completions(tmp_path: Path) -> None:
    records = read_jsonl(write(tmp_path, GOOD, '{"prompt": "a", "completion": ["b", "c", "d"]}'), Use.EVALUATION)
    assert [(r.completion, r.others) for r in records.completions] == [("b", ()), ("b", ("c", "d"))]


def test_a_prompt_needs_no_completion(tmp_path: Path) -> None:
    lines = (GOOD, '{"prompt": "a"}', '{"prompt": "a", "completion": ""}', '{"prompt": "a", "completion": [7]}')
    records = read_jsonl(write(tmp_path, *lines), Use.GENERATION)
    assert [(r.prompt, r.completion, r.others) for r in records.completions] == [("a", "", ())] * len(lines)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "completion": []}', "'completion' is an empty array"),
        ('{"prompt": "a", "completion": ["b", 1]}', r"'completion\[1\]' is a JSON number; write a string"),
        ('{"prompt": "a", "completion": ["b", ""]}', r"'completion\[1\]' is empty"),
        ('{"prompt": "a", "completion": ["\\ud800"]}', r"'completion\[0\]' holds an unpaired surrogate"),
        ('{"prompt": "a", "completion": {"b": 1}}', "'completion' is a JSON object; write a string"),
        ('{"prompt": "a"}', "'completion' is missing"),
    ],
)
def test_bad_completions_to_judge_by_are_named(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(UserError, match=f":2: key {said}"):
        read_jsonl(write(tmp_path, GOOD, line), Use.EVALUATION)


def test_what_a_caller_refuses_is_a_problem_of_its_line(tmp_path: Path) -> None:
    def check(record: object) -> None:
        if record.prompt == "no":
            raise Problem("not this")

    path = write(tmp_path, "{", GOOD, '{"prompt": "no", "completion": "b"}')
    with pytest.raises(UserError) as caught:
        read_jsonl(path, check=check)
    assert [row.split(": ")[0] for row in str(caught.value).splitlines()] == [f"{path}:1", f"{path}:3"]


def test_mixed_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r":3: a 'messages' line in a file that began with 'completion' lines"):
        read_jsonl(write(tmp_path, GOOD, GOOD, CHAT))


def test_all_problems_come_in_one_error_up_to_the_limit(tmp_path: Path) -> None:
    bad = ["{", '{"prompt": "a"}', GOOD]
    with pytest.raises(UserError) as caught:
        read_jsonl(write(tmp_path, *bad))
    assert [row.split(": ")[0].rsplit(":", 1)[1] for row in str(caught.value).splitlines()] == ["1", "2"]
    with pytest.raises(UserError) as caught:
        read_jsonl(write(tmp_path, *[f'{{"odd{number}": 1}}' for number in range(MAX_PROBLEMS + 7)]))
    rows = str(caught.value).splitlines()
    assert len(rows) == MAX_PROBLEMS + 1 and rows[-1] == "... and 7 more lines with errors"


@pytest.mark.parametrize(
    ("lines", "places"),
    [
        (["7"] * 1200, [": all 1,200 lines: a JSON number"]),
        ([*["7"] * 1200, "", GOOD], [": lines 1, 2, 3 and 1,197 more: a JSON number"]),
        ([GOOD, "7", GOOD, "7", "7"], [": lines 2, 4 and 5: a JSON number"]),
        (["7", GOOD, "7", "{"], [": lines 1 and 3: a JSON number", ":4: malformed"]),
        (["7"], [":1: a JSON number"]),
    ],
)
def test_a_fault_that_lines_share_is_one_row(tmp_path: Path, lines: list[str], places: list[str]) -> None:
    path = write(tmp_path, *lines)
    with pytest.raises(UserError) as caught:
        read_jsonl(path)
    rows = str(caught.value).splitlines()
    assert len(rows) == len(places)
    assert all(row.startswith(f"{path}{place}") for row, place in zip(rows, places, strict=True))


@pytest.mark.parametrize("content", [b"", b"\n \n\t\r\n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"empty\.jsonl: the file has no samples"):
        read_jsonl(tmp_path / "empty.jsonl")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(UserError, match="no such file; give a JSONL file with one JSON object"):
            read_jsonl(path)


def test_a_json_array_file_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([json.loads(GOOD)]))
    with pytest.raises(
        UserError, match=r"data\.json:1: the file is one JSON array; write one object per line"
    ) as caught:
        read_jsonl(path)
    assert "did you mean" not in str(caught.value)
    path.write_text(json.dumps([{"id": "1", "conversations": [{"from": "human", "value": "x"}]}], indent=1))
    with pytest.raises(UserError, match=r"\('conversations': did you mean 'messages'\?.*bring-your-own-data\.md"):
        read_jsonl(path)


def test_a_json_array_over_many_lines_is_one_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.jsonl:1: the file is one JSON array; write one object per line"):
        read_jsonl(write(tmp_path, "[", f"  {GOOD},", f"  {GOOD}", "]"))
