"""The child process that renders untrusted chat templates; `rendering.Renderer` runs it as a script.

Jinja has no bound on loops, sizes or numbers, and it folds constants while it compiles. Both compiling and rendering
are therefore done here, with bounds on time, memory and output. Rendering is deterministic: the template's clock always
returns the given moment, and random numbers are seeded anew for each text.

Standard input has one JSON object per line: first {"template", "special", "moment", "seconds", "memory"}, then chats,
{"messages", "cuts", "marked"}. Each chat is answered by one line on standard output. Imports nothing from this package.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import time
import traceback
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers.utils import chat_template_utils

# All processes of a job get these signals, and the parent handles them.
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Most characters of a text: MOST_ADDED plus MOST_TIMES those of its messages. Templates add a system prompt and turn
# markers.
MOST_ADDED, MOST_TIMES = 1 << 18, 16
_IDLE_SECONDS = 20
_LONGEST_ERROR = 500
# Jinja's name for a template that comes from no file, in the frames that it adds to an error's traceback.
_TEMPLATE = "<template>"


class Unusable(ValueError):
    """A text that a template renders and that cannot be used; the message is the reason."""


class Clock(datetime):
    """`datetime` with a `now` that always returns `present`."""

    present = datetime(2000, 1, 1)

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return cls.present


def texts(job: dict[str, Any], chat: dict[str, Any]) -> dict[str, Any]:
    """Return the rendered {"texts", "spans"} of a chat.

    texts: its first n messages, for each [n, add_generation_prompt] of its cuts. spans: characters [start, end) of the
    generation blocks of the last text, empty if the chat is not marked.
    """
    found: list[str] = []
    given = sum(len(message["content"]) for message in chat["messages"])
    spans: list[Any] = []
    for count, prompt in chat["cuts"]:
        random.seed(0)
        both: Any = chat_template_utils.render_jinja_template(
            conversations=[chat["messages"][:count]],
            chat_template=job["template"],
            return_assistant_tokens_mask=chat["marked"],
            add_generation_prompt=prompt,
            **job["special"],
        )
        (text,), spans = both
        if len(text) > (most := MOST_ADDED + MOST_TIMES * given):
            raise Unusable(f"it turns {given:,} characters into {len(text):,}; the limit is {most:,}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Unusable(f"it writes an unpaired surrogate, at character {error.start}") from error
        found.append(text)
    return {"texts": found, "spans": spans[0] if chat["marked"] else []}


def answer(job: dict[str, Any], chat: dict[str, Any]) -> dict[str, Any]:
    """Return the result of `texts`, or {"error", "line", "refused"} for what the template or Python raised.

    error: the message. line: the template's line, None where it is not known. refused: the template itself refused the
    messages, by raise_exception.
    """
    try:
        return texts(job, chat)
    except MemoryError as error:
        return _fault(error, f"it takes more than {job['memory'] >> 20} MiB of memory")
    except (Unusable, TemplateError) as error:
        return _fault(error, str(error) or type(error).__name__)
    except Exception as error:  # whatever a template makes Python raise
        return _fault(error, f"{type(error).__name__}: {error}")


def _fault(error: BaseException, message: str) -> dict[str, Any]:
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == _TEMPLATE]
    line = error.lineno if isinstance(error, TemplateSyntaxError) else lines[-1] if lines else None
    # Jinja's own errors are subclasses.
    return {"error": message[:_LONGEST_ERROR], "line": line, "refused": type(error) is TemplateError}


def serve() -> None:
    """Answer until the input ends or no request comes for `_IDLE_SECONDS`."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The memory limit does not count the imports: some releases of transformers import torch, which takes 10 GiB of
    # address space with CUDA.
    imported = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    chat_template_utils.datetime = Clock  # type: ignore[misc]
    job: dict[str, Any] = {}
    chats, answers = open(0, "rb", closefd=False), open(1, "wb", closefd=False)
    while True:
        signal.alarm(_IDLE_SECONDS)
        line = chats.readline()
        signal.alarm(0)
        if not line:
            return
        given = json.loads(line)
        if "template" in given:
            job, Clock.present = given, datetime.fromisoformat(given["moment"])
            # A smaller limit (`ulimit -v`) stays, and is the one that errors name.
            job["memory"] = _limit(resource.RLIMIT_AS, imported + job["memory"]) - imported
            continue
        # Beyond this limit the kernel kills the process, whatever operation it is in.
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + job["seconds"])
        answers.write(json.dumps(answer(job, given), ensure_ascii=False).encode(errors="replace") + b"\n")
        answers.flush()


def _limit(what: int, most: int) -> int:
    """Limit this process to `most`, or to its hard limit where that is less. Return the limit."""
    hardest = resource.getrlimit(what)[1]
    limit = most if hardest == resource.RLIM_INFINITY else min(most, hardest)
    resource.setrlimit(what, (limit, hardest))
    return limit


if __name__ == "__main__":
    serve()
