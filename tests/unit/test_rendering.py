"""Chat templates from untrusted files: rendered as in transformers, within limits, at a fixed time."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lowrank_dist.data.rendering import RENDERER
from lowrank_dist.data.template import Messages
from lowrank_dist.data.tokenizer import FastTokenizer, load_tokenizer
from lowrank_dist.errors import UserError
from tests import tiny_tokenizers as tiny

CHAT = [{"role": "user", "content": "hi\n ünï <|im_end|>"}, {"role": "assistant", "content": " world "}]
MOMENT = datetime(2020, 2, 29, 23, 59, 58)


@pytest.fixture(autouse=True)
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RENDERER, "seconds", 1)
    monkeypatch.setattr(RENDERER, "memory", 256 << 20)


def end_child() -> None:
    if RENDERER._process is not None:
        RENDERER._process.kill()
        RENDERER._process.wait()


def render(folder: Path, template: str, chats: list[Messages] | None = None, moment: datetime = MOMENT) -> list[str]:
    tokenizer = load_tokenizer(tiny.byte_level(folder, template=template, bos=True), moment)
    assert isinstance(tokenizer, FastTokenizer) and tokenizer.template is not None
    asked = [CHAT] if chats is None else chats
    return [chat.text for chat in tokenizer.template.render(asked, [f"f:{n + 1}" for n in range(len(asked))])]


def marked(body: str) -> str:
    return "{% generation %}" + body + "{{ '<|im_end|>' }}{% endgeneration %}"


@pytest.mark.parametrize(
    "template",
    [
        *(tiny.CHATML, tiny.CHATML_MARKED, tiny.LLAMA3, tiny.LLAMA2, tiny.MISTRAL, tiny.ALPACA, tiny.DROPS_THINKING),
        marked(
            "{{ messages | tojson(indent=2) }}{% for n in range(9) %}{% if n > 3 %}{% break %}{% endif %}{% endfor %}"
        ),
        marked("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"),
    ],
)
def test_texts_are_those_of_transformers(template: str, tmp_path: Path) -> None:
    chats = [CHAT, CHAT[:1], [*CHAT, *CHAT]] if template != tiny.DROPS_THINKING else [CHAT, CHAT[:1]]
    texts = render(tmp_path, template, chats)
    hf = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert texts == [hf.apply_chat_template(chat, tokenize=False) for chat in chats]


BOMBS = {
    "a constant that is folded": ("{{ 'a' * 3000000000 }}", ""),
    "a text": ("{{ 'a' * 20000000 }}", "it turns 25 characters into 20,000,010; the limit is 262,544"),
    "memory": ("{% for n in range(99) %}{{ 'a' * 9000000 }}{% endfor %}", "more than 256 MiB of memory"),
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 1 s"),
    "a number": ("{{ 9 ** (9 ** 9) }}", "more than 1 s"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "nesting": ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", ""),
    "half a pair": ("{{ '\\ud800' }}", "an unpaired surrogate, at character"),
    "no number": ("{{ 1 // 0 }}", "by zero"),
    "an attribute": ("{{ messages.__class__.__mro__ }}", "unsafe|undefined"),
    "a long message": ("{{ raise_exception('x' * 100000) }}", r"x{500} \(chat_template"),
}


# Two templates that only the time limit ends, each after a second and in a new process. Every change runs one.
@pytest.mark.parametrize(
    "bomb", [pytest.param(name, marks=[pytest.mark.slow] * (name == "a number")) for name in BOMBS]
)
def test_a_template_over_a_bound_is_refused(bomb: str, tmp_path: Path) -> None:
    template, said = BOMBS[bomb]
    how = "refuses" if bomb == "a long message" else "fails on"
    with pytest.raises(UserError, match=rf"(?s)^f:1: the chat template of .* {how} these messages: .*({said})"):
        render(tmp_path, marked(template))
    # The next template renders normally.
    assert render(tmp_path / "next", tiny.CHATML)[0].endswith("<|im_end|>\n")


@pytest.mark.parametrize("bomb", ["memory", "no number", "a long message"])
def test_the_line_that_is_refused_is_named(bomb: str, tmp_path: Path) -> None:
    template = "{% if messages | length > 2 %}" + BOMBS[bomb][0] + "{% endif %}"
    with pytest.raises(UserError, match=rf"(?s)^f:2: .*({BOMBS[bomb][1]})"):
        render(tmp_path, marked(template), [CHAT, [*CHAT, *CHAT], CHAT])


def in_settings(folder: Path, template: object) -> Path:
    """Write a tokenizer with this chat_template in its tokenizer_config.json, and return that file."""
    settings = tiny.byte_level(folder) / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": template}))
    return settings


# Each with what the error says of it. The fault is on the template's third line.
FAULTS = {
    "{{ 1 / (messages | length - 1) }}": "fails on these messages: ZeroDivisionError: division by zero",
    "{{ messages[0].content.index('zz') }}": "fails on these messages: ValueError: substring not found",
    "{{ 10.0 ** (999 * messages | length) }}": "fails on these messages: OverflowError: ",
    "{{ range(999999) | list }}": "fails on these messages: OverflowError: Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "fails on these messages: RecursionError: ",
    "{{ messages + 1 }}": "fails on these messages: TypeError: ",
    "{{ namespace(1) }}": "fails on these messages: TypeError: ",
    "{{ messages.nothing.more }}": "fails on these messages: 'list object' has no attribute 'nothing'",
    "{{ 'a' * (300000000 * messages | length) }}": "fails on these messages: it takes more than 256 MiB of memory",
    "{% for %}": "fails on these messages: Expected an expression",
    "{{ raise_exception('roles alternate') }}": "refuses these messages: roles alternate",
    "{{ raise_exception('roles\\nalternate') }}": "refuses these messages: roles\\nalternate",
}


@pytest.mark.parametrize("jinja", [False, True], ids=["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_with_sample_and_the_line_of_the_template(fault: str, jinja: bool, tmp_path: Path) -> None:
    template = "{# one -#}\n{{ messages[0].role }}\n" + fault
    remedy = "correct the template"
    if "refuses" in FAULTS[fault]:
        remedy = "change the messages or the template"
    place = "chat_template.jinja" if jinja else "chat_template in tokenizer_config.json"
    in_settings(tmp_path, tiny.CHATML if jinja else template)
    if jinja:
        (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, FastTokenizer) and tokenizer.template is not None
    with pytest.raises(UserError) as error:
        tokenizer.template.render([CHAT], ["f:1"])
    said = re.escape(f"f:1: the chat template of {tmp_path} {FAULTS[fault]}")
    assert re.fullmatch(rf"{said}.* \({re.escape(place)}, line 3\); {remedy}", str(error.value)), error.value


@pytest.mark.parametrize(
    "value",
    [5, 0, True, ["x"], [{"name": "default"}], [{"name": 5, "template": "x"}], [{"template": "x"}], {"default": 5}],
    ids=repr,
)
def test_a_template_of_another_kind_is_refused_by_its_key(value: object, tmp_path: Path) -> None:
    settings = in_settings(tmp_path, value)
    said = re.escape(f"{settings}: chat_template must be text, or a list of objects") + ".*; correct it, remove it"
    with pytest.raises(UserError, match=said):
        load_tokenizer(tmp_path)
    # transformers reads the file instead.
    (tmp_path / "chat_template.jinja").write_text(tiny.CHATML)
    assert load_tokenizer(tmp_path).template is not None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("value", "has_template"),
    [
        (tiny.CHATML, True),
        ([{"name": "default", "template": tiny.CHATML}, {"name": "tool_use", "template": "x"}], True),
        ({"default": tiny.CHATML}, True),
        (None, False),
        ("", False),
        ([], False),
        ({}, False),
    ],
    ids=repr,
)
def test_templates_of_published_models_are_read(value: object, has_template: bool, tmp_path: Path) -> None:
    in_settings(tmp_path, value)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, FastTokenizer) and (tokenizer.template is not None) is has_template


def test_named_templates_without_a_default_are_named(tmp_path: Path) -> None:
    in_settings(tmp_path, [{"name": name, "template": "x"} for name in ("tool_use_", "rag")])
    with pytest.raises(UserError, match="its templates are rag, tool_use_, and none is the default; name the one"):
        load_tokenizer(tmp_path)


def test_a_dead_branch_costs_nothing(tmp_path: Path) -> None:
    (text,) = render(tmp_path, marked("{% if false %}{{ 'a' * 3000000000 }}{% endif %}{{ messages[0].content }}"))
    assert text == "hi\n ünï <|im_end|><|im_end|>"


def test_the_clock_says_one_moment(tmp_path: Path) -> None:
    template = marked("{{ strftime_now('%d %B %Y %H:%M:%S') }}")
    assert render(tmp_path, template) == ["29 February 2020 23:59:58<|im_end|>"]
    assert render(tmp_path, template, moment=datetime(1999, 1, 1)) == ["01 January 1999 00:00:00<|im_end|>"]
    # Without a fixed moment it is the present, as in transformers.
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, FastTokenizer) and tokenizer.template is not None
    today = datetime.now()
    (chat,) = tokenizer.template.render([CHAT], ["f:1"])
    assert 0 <= (datetime.strptime(chat.text, "%d %B %Y %H:%M:%S<|im_end|>") - today).total_seconds() + 60 < 120
    assert tokenizer.template.reads_the_clock


def test_chance_is_the_same_everywhere(tmp_path: Path) -> None:
    template = marked("{{ range(99999) | random }} {{ lipsum(1) }}")
    first, again = render(tmp_path, template, [CHAT, CHAT])
    assert first == again
    end_child()
    assert render(tmp_path, template) == [first]


def test_the_child_ends_by_itself_and_is_started_again(tmp_path: Path) -> None:
    expected = render(tmp_path, tiny.CHATML)
    process = RENDERER._process
    assert process is not None
    # The child ignores signals to all of a job's processes, and ends when it has nothing to do.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        process.send_signal(number)
    assert render(tmp_path, tiny.CHATML) == expected and RENDERER._process is process
    process.send_signal(signal.SIGALRM)
    assert render(tmp_path, tiny.CHATML, [CHAT] * 3) == expected * 3


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_what_is_sent_to_all_processes_while_it_starts_ends_nothing(number: signal.Signals, tmp_path: Path) -> None:
    """A job that is preempted while it reads its data stops at its first step and has not failed."""
    end_child()
    RENDERER._started().send_signal(number)
    assert render(tmp_path, tiny.CHATML, [CHAT] * 3) == render(tmp_path, tiny.CHATML) * 3


def test_the_memory_is_beside_what_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.0 imports torch for its templates, which takes more address space than a template may."""
    (tmp_path / "sitecustomize.py").write_text("import mmap\nheld = mmap.mmap(-1, 4 << 30)\n")
    end_child()
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        # More than the imports left free.
        long = [{"role": "user", "content": "x" * 2_000_000}, CHAT[1]]
        assert render(tmp_path / "good", tiny.CHATML, [long])[0].endswith("<|im_end|>\n")
        with pytest.raises(UserError, match="more than 256 MiB of memory"):
            render(tmp_path / "bad", marked(BOMBS["memory"][0]))
    end_child()


def test_a_smaller_limit_of_the_user_is_the_one_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `ulimit -v`, which bounds the imports as well."""
    end_child()
    monkeypatch.setattr(RENDERER, "memory", 4 << 30)
    pid = RENDERER._started().pid
    resource.prlimit(pid, resource.RLIMIT_AS, (700 << 20, 700 << 20))
    with pytest.raises(UserError, match=r"more than [1-6]\d\d MiB of memory"):
        render(tmp_path, marked(BOMBS["memory"][0]))
    end_child()


def test_where_no_process_can_be_started_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    end_child()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", refuse)
        with pytest.raises(UserError, match="cannot be started .*unavailable.*; allow one more"):
            render(tmp_path, tiny.CHATML)
    assert render(tmp_path, tiny.CHATML)


def test_many_long_chats(tmp_path: Path) -> None:
    """More text than a pipe holds, in both directions."""
    chats = [[{"role": "user", "content": f"{n} " + "x" * 20_000}] for n in range(200)]
    texts = render(tmp_path, tiny.CHATML, chats)
    assert [len(text) for text in texts] == [len(chat[0]["content"]) + len(texts[0]) - 20_002 for chat in chats]


def test_an_error_of_an_earlier_line_comes_first_and_leaves_the_child_usable(tmp_path: Path) -> None:
    """Answers are read as they come, so the pieces of a whole chunk of chats are never held at once."""
    template = tiny.DROPS_THINKING + "{% if messages[0].content == 'boom' %}{{ 1 // 0 }}{% endif %}"
    boom = [{"role": "user", "content": "boom"}]
    with pytest.raises(UserError, match=r"f:2: .* renders messages\[1\] or an earlier one differently"):
        render(tmp_path, template, [CHAT, [*CHAT, *CHAT], boom, *([CHAT] * 300)])
    with pytest.raises(UserError, match="f:2: .* fails on these messages: .*by zero"):
        render(tmp_path, template, [CHAT, boom, [*CHAT, *CHAT]])
    assert len(render(tmp_path, tiny.CHATML, [CHAT] * 3)) == 3
