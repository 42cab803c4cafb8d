"""The process that renders chat templates, which anyone may have written: run as a script by `rendering.Renderer`.

Jinja folds constants while it compiles and has no bound on loops, sizes or numbers, so both are done here, within
bounds of time, memory and output. What a template can ask for is the same in every process and at every time: the clock
says the moment that it is given, and chance begins anew with each text.

Standard input has a JSON object a line: first {"template", "special", "moment", "seconds", "memory"}, then chats,
{"messages", "cuts", "marked"}, of which each is answered by a line on standard output. Imports nothing of ours.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers.utils import chat_template_utils

# They go to all processes of a job, and are the parent's to follow.
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Characters of a text beside so many times those of its messages: a template adds a system prompt and marks of turns.
MOST_ADDED, MOST_TIMES = 1 << 18, 16
_IDLE_SECONDS = 20
_LONGEST_ERROR = 500


class Clock(datetime):
    """`datetime` whose present is always the same."""

    present = datetime(2000, 1, 1)

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return cls.present


def texts(job: dict[str, Any], chat: dict[str, Any]) -> dict[str, Any]:
    """Return {"texts", "spans"} of a chat: the texts of its first n messages, for each [n, add_generation_prompt] of
    its cuts, and if it is marked the characters [start, end) of the last text's generation blocks."""
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
            raise ValueError(f"it makes {len(text):,} characters of {given:,}; at most {most:,} are taken")
        text.encode()  # a template may spell out half of a surrogate pair
        found.append(text)
    return {"texts": found, "spans": spans[0] if chat["marked"] else []}


def answer(job: dict[str, Any], chat: dict[str, Any]) -> dict[str, Any]:
    """Return what `texts` does, or {"error"}: what the template, or Python under it, raised."""
    try:
        return texts(job, chat)
    except MemoryError:
        return {"error": f"it takes more than {job['memory'] >> 20} MiB of memory"}
    except Exception as error:  # whatever a template makes Python raise
        return {"error": str(error)[:_LONGEST_ERROR] or type(error).__name__}


def serve() -> None:
    """Answer until the input ends or nothing comes for a while."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Beside what was imported: some releases of transformers import torch with it, which takes 10 GiB with CUDA.
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
            _limit(resource.RLIMIT_AS, imported + job["memory"])
            continue
        # The kernel ends this process, in whatever operation it is.
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + job["seconds"])
        answers.write(json.dumps(answer(job, given), ensure_ascii=False).encode(errors="replace") + b"\n")
        answers.flush()


def _limit(what: int, most: int) -> None:
    hardest = resource.getrlimit(what)[1]
    resource.setrlimit(what, (most if hardest == resource.RLIM_INFINITY else min(most, hardest), hardest))


if __name__ == "__main__":
    serve()
