"""The commands and Python of the tutorial and the how-to pages, run in the order of each page."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.documented import PYTHON, ROOT, SHELL, Block, blocks, make_clone, run

DOCS = ROOT / "docs"
PAGES = {
    page: page.read_text()
    for page in [*DOCS.glob("tutorial.md"), DOCS / "reference" / "python.md", *sorted((DOCS / "how-to").glob("*.md"))]
}


def runnable(page: Path, text: str) -> list[Block]:
    """Return the blocks of a page that are run, and the files that they need."""
    found = [block for block in blocks(page, text) if block.needs is None]
    return [block for block in found if block.title is not None or block.language in (SHELL, PYTHON)]


@pytest.mark.parametrize(
    "page", [page for page, text in PAGES.items() if runnable(page, text)], ids=lambda page: page.stem
)
def test_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_clone(tmp_path, PAGES[page])
    monkeypatch.chdir(tmp_path)
    for block in runnable(page, PAGES[page]):
        run(block, tmp_path)


GOOD = """
<!-- given: model models/base, samples data/train.jsonl, chats data/chats.jsonl -->

```yaml title="my.yaml"
model: {path: models/base, device: cpu}
lora: {rank: 2}
parallel: {tensor: 2}
data: {train: data/train.jsonl, eval: data/chats.jsonl, max_length: 64}
train: {steps: 2, global_batch: 4}
output: {dir: runs/first}
```

```sh
deepspeed --num_gpus 2 launch/train.py my.yaml train.lr=1e-3
lowrank-dist merge --base models/base --adapter runs/first/adapter --out merged
ls merged | grep -q model.safetensors && echo "it is there"
```

```python
from safetensors import safe_open

with safe_open("merged/model.safetensors", "pt") as file:
    assert file.keys()
```
"""


def test_a_good_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_clone(tmp_path, GOOD)
    monkeypatch.chdir(tmp_path)
    for block in runnable(DOCS / "good.md", GOOD):
        run(block, tmp_path)
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("```sh\nlowrank-dist inspect nothing\n```", "No such file"),
        ("```sh\ncat nothing | head -1 && false\n```", "exit code 1"),
        ("```python\nraise SystemExit(3)\n```", "exit code 3"),
    ],
)
def test_what_fails_is_told(text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(DOCS / "bad.md", text)
    with pytest.raises(AssertionError, match=f"(?s)bad.md:1: .*{told}"):
        run(block, tmp_path)
