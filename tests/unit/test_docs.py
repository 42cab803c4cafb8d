"""The pages of documentation: links resolve, code blocks can be run, and pages made from the code are up to date."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from docs.flowchart import parse, to_svg
from docs.generate_reference import pages
from docs.site_hooks import on_page_markdown
from lowrank_dist import __version__
from lowrank_dist.arch.config_json import parse_architecture
from lowrank_dist.arch.families import FAMILIES
from lowrank_dist.config.load import config_of
from lowrank_dist.data.formats import read_jsonl
from lowrank_dist.errors import UserError
from tests.documented import blocks, mistakes

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")), *sorted(DOCS.rglob("*.md"))]

# --- links -----------------------------------------------------------------------------------------------------------

_FENCE = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)\s*$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
# [text](target) and ![text](target "title")
_LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*$", re.MULTILINE)


def links(text: str) -> list[str]:
    """Return the targets of links and images outside code."""
    return _LINK.findall(_CODE.sub("``", _FENCE.sub("", text)))


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as on the forge and the site; of equal headings the first one's."""
    headings = _HEADING.findall(_FENCE.sub("", text))
    words = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", each).strip().replace(" ", "-") for each in words}


def broken_links(page: Path, text: str) -> Iterator[str]:
    """Yield each relative link of a page that leads to no file, to no heading, or out of the repository."""
    for target in links(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path
        if path and (path.startswith("/") or not file.resolve().is_relative_to(ROOT) or not file.exists()):
            yield target
        elif anchor and path and file.suffix != ".md":
            yield target
        elif anchor and anchor not in anchors(file.read_text() if path else text):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken_links(page, page.read_text())) == []


@pytest.mark.parametrize(
    "text",
    [
        "[x](gone.md)",
        "![x](gone.png)",
        "[x](DESIGN.md#no-such-heading)",
        "# Here\n\n[x](#there)",
        "[x](/docs/DESIGN.md)",
        "[x](../../outside.md)",
        "[x](latency.png#part)",
        "```\n[y](gone.md)\n```\n[x](other.md)",
    ],
)
def test_a_planted_broken_link_is_found(text: str) -> None:
    assert len(list(broken_links(DOCS / "page.md", text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "[x](DESIGN.md#the-update-rides-the-collectives-that-are-already-there)",
        "# A, b: `c` – d!\n[x](#a-b-c--d) [z](../csrc) [w](https://example.org/x#y)",
        "`[x](gone.md)`",
        "```python\n[x](gone.md)\n```",
    ],
)
def test_a_good_link_is_not_found(text: str) -> None:
    assert list(broken_links(DOCS / "page.md", text)) == []


def test_the_site_has_no_link_that_leaves_docs() -> None:
    class File:
        src_uri = "how-to/page.md"

    class Page:
        file = File

    text = "[tests](../../tests/gpu/README.md) [csrc](../../csrc) [design](../DESIGN.md#rooms) ![x](../../x.png)"
    shown = "tests (`tests/gpu/README.md`) csrc [design](../DESIGN.md#rooms) ![x](../../x.png)"
    assert on_page_markdown(text, page=Page) == shown


CHART = """
flowchart TB
    classDef collective stroke-width:3px
    a["first<br/>of two lines"] --> b
    subgraph inner ["a <group>"]
        direction TB
        b --> c["X·W"]:::collective
    end
    a -- "a label" --> c --> d
"""


def test_a_flowchart_is_drawn() -> None:
    chart = parse(CHART)
    assert chart.edges == [("a", "b", ""), ("b", "c", ""), ("a", "c", "a label"), ("c", "d", "")]
    assert {name: (node.lines, node.thick, node.group) for name, node in chart.nodes.items()} == {
        "a": (["first", "of two lines"], False, None),
        "b": (["b"], False, None),
        "c": (["X·W"], True, "inner"),
        "d": (["d"], False, None),
    }
    drawn = to_svg(CHART)
    assert drawn.count("<path") == 4 + 1 and drawn.count("<rect") == 4 + 1 and "a &lt;group&gt;" in drawn
    assert 'stroke-width="3"' in drawn and ">a label<" in drawn and "\n" not in drawn
    ElementTree.fromstring(drawn)


@pytest.mark.parametrize("line", ["a ==> b", "a{b} --> c", "flowchart LR", "a[b --> c"])
def test_what_cannot_be_drawn_is_refused(line: str) -> None:
    with pytest.raises(ValueError):
        parse(f"flowchart TB\n{line}")


def test_the_site_draws_every_flowchart() -> None:
    class Page:
        file = type("File", (), {"src_uri": "DESIGN.md"})

    drawn = on_page_markdown((DOCS / "DESIGN.md").read_text(), page=Page)
    assert drawn.count("<svg") == (DOCS / "DESIGN.md").read_text().count("```mermaid") > 1


def test_every_page_is_in_the_navigation() -> None:
    class Loader(yaml.SafeLoader):
        """Reads mkdocs.yml, which names a Python function."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)  # noqa: S506, a SafeLoader

    def files(nav: object) -> Iterator[str]:
        if isinstance(nav, str):
            yield nav
        for inner in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
            yield from files(inner)

    assert sorted(files(settings["nav"])) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


# --- code blocks -----------------------------------------------------------------------------------------------------

# Their commands and YAML are checked against the program here, and run by tests/integration/test_documented.py.
TASKS = [page for page in PAGES if page.parent.name == "how-to" or page.name in ("tutorial.md", "python.md")]


@pytest.mark.parametrize("page", TASKS, ids=lambda page: page.stem)
def test_blocks_are_what_the_program_takes(page: Path) -> None:
    assert [mistake for block in blocks(page, page.read_text()) for mistake in mistakes(block)] == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("```yaml\ntrain: {learning_speed: 1}\n```", "train.learning_speed: unknown key"),
        ("```yaml\ntrain: {lr: fast}\n```", "train.lr: 'fast' is not valid"),
        ("```yaml\ntrain: [lr\n```", "expected"),
        ("```sh\nlowrank-dist plan gpt3-175b --nodse 4\n```", "--nodse"),
        ("```sh\nlowrank-dist merge --base a --adapter b\n```", "--out"),
        ("```sh\nlowrank-dist plot x\n```", "no command plot"),
        ("```sh\nlowrank-dist plan gpt3-175b lora.rang=4 --nodes 4 > out.txt\n```", "no key lora.rang"),
        ("```sh\nsrun python -P -m lowrank_dist.cli doctor c.yaml --jsn\n```", "--jsn"),
        (
            "```sh\nOMP_NUM_THREADS=1 deepspeed --num_gpus 2 launch/train.py c.yaml \\\n  train.step=4\n```",
            "no key train.step",
        ),
        ("<!-- needs a cluster -->\n```sh\nlowrank-dist slurm c.yaml --nodes 2\n```", "--gpus-per-node"),
        ("<!-- needs luck -->\n\n```sh\nls\n```", "not luck"),
        ("```bash\nls\n```", "a block is one of"),
    ],
)
def test_a_planted_mistake_in_a_block_is_found(text: str, told: str) -> None:
    (block,) = blocks(DOCS / "page.md", text)
    (mistake,) = mistakes(block)
    assert mistake.startswith("page.md:") and told in mistake


def test_what_the_program_takes_is_not_found() -> None:
    text = """
```yaml title="my.yaml"
lora: {rank: 4}
data: {train: d.jsonl}
```

<!-- needs a cluster -->

```sh
lowrank-dist slurm my.yaml --nodes 2 --gpus-per-node 8 train.lr=1e-3  # a comment
sbatch lowrank.sbatch
```

Text.

```sh
lowrank-dist merge --base a --adapter b --out c --verify && ls c
torchrun --nproc-per-node 2 launch/train.py my.yaml --train.steps=3 method=full
```
"""
    found = list(blocks(DOCS / "page.md", text))
    assert [(each.line, each.language, each.title, each.needs) for each in found] == [
        (2, "yaml", "my.yaml", None),
        (9, "sh", None, "a cluster"),
        (16, "sh", None, None),
    ]
    assert [mistake for block in found for mistake in mistakes(block)] == []


# --- names of the code -----------------------------------------------------------------------------------------------

# Pages that walk through the code: every file and name that they mention must exist.
WALKS = sorted((DOCS / "how-to").glob("add-a*.md"))
_SPAN = re.compile(r"`([^`\n]+)`")
_SUFFIXES = (".py", ".md", ".cpp", ".cu", ".cuh", ".h", ".yaml", ".sh")
_SOURCES = ("lowrank_dist", "launch", "tests", "benchmarks", "csrc", "setup.py")
# Names of other projects: transformers' files, names in torch and C++, keys of config.json.
_FOREIGN = {"configuration_<family>.py", "modeling_<family>.py", "std::", "at::", "opcheck", "make", "pip"}


def unknown_names(text: str, words: Collection[str]) -> list[str]:
    """Return the files and names in a page's code spans that the repository does not have."""
    found = []
    for span in _SPAN.findall(_FENCE.sub("", text)):
        if span in _FOREIGN:
            continue
        if "/" in span and " " not in span or span.endswith(_SUFFIXES):
            if not list(ROOT.glob(re.sub(r"<\w+>", "*", span.rstrip("/")))):
                found.append(span)
        elif re.fullmatch(r"[A-Za-z_][\w.]*", span) and not set(span.split(".")) <= set(words):
            found.append(span)
    return found


@pytest.fixture(scope="module")
def words() -> set[str]:
    """Return every word of the sources."""
    paths = [path for name in _SOURCES for path in ([ROOT / name] if "." in name else (ROOT / name).rglob("*.*"))]
    texts = [path.read_text() for path in paths if path.suffix in _SUFFIXES and path != Path(__file__)]
    return {word for text in texts for word in re.findall(r"\w+", text)}


@pytest.mark.parametrize("page", WALKS, ids=lambda page: page.stem)
def test_what_a_page_names_is_there(page: Path, words: set[str]) -> None:
    assert len(_SPAN.findall(page.read_text())) > 20
    assert unknown_names(page.read_text(), words) == []


def test_a_planted_name_is_found(words: set[str]) -> None:
    good = "`lowrank_dist/ops/low_rank.py` `lowrank_dist/methods/<name>/config.py` `csrc/cpu/` `LowRankLinear.attach`"
    assert unknown_names(good, words) == []
    bad = ["lowrank_dist/ops/gone.py", "gone.py", "tests/<name>/nothing.py", "NoSuchClass", "LowRankLinear.gone_away"]
    assert unknown_names(" ".join(f"`{name}`" for name in bad), words) == bad


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == __version__ and versions == sorted(versions, reverse=True)


# --- the list of unsupported things ----------------------------------------------------------------------------------

NOT_SUPPORTED = (DOCS / "reference" / "not-supported.md").read_text()
_LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA |= {"intermediate_size": 96, "vocab_size": 100}


def test_the_families_that_are_named_are_those_there_are() -> None:
    families = re.search(r"\*\*Families\*\* other than ([^:]+):", NOT_SUPPORTED)
    assert families is not None
    named = set(re.findall(r"\w+", re.sub(r"\([^)]*\)|\band\b", "", families[1])))
    assert named == set(FAMILIES)


def test_readme_names_each_family() -> None:
    """Without versions: Qwen2, 3 are qwen2 and qwen3."""
    listed = re.search(r"^Models: (.*?)Methods:", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert listed is not None
    names = re.sub(r"\W", "", listed[1]).lower()
    assert [each for each in FAMILIES if re.sub(r"\d*(_text)?$|_", "", each) not in names] == []


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        ("no mixture of experts", {"model_type": "mixtral"}),
        ("multi-head latent", {"model_type": "deepseek_v3"}),
        ("default, linear, dynamic, llama3, yarn and longrope", {"rope_scaling": {"rope_type": "proportional"}}),
        ("Rotation of a part", {"partial_rotary_factor": 0.5}),
        ("**Quantised bases**", {"quantization_config": {"bits": 4}}),
    ],
)
def test_a_model_that_is_not_supported_is_refused(line: str, keys: dict[str, object]) -> None:
    assert line in NOT_SUPPORTED
    with pytest.raises(UserError, match="not supported"):
        parse_architecture({**_LLAMA, **keys}, "config.json")
    parse_architecture(_LLAMA, "config.json")


@pytest.mark.parametrize(
    ("line", "row"),
    [
        ("no ShareGPT", {"conversations": [{"from": "human", "value": "x"}]}),
        ("no Alpaca", {"instruction": "x", "output": "y"}),
        ("no Alpaca", {"instruction": "x", "input": "z", "output": "y"}),
        ("no preference optimisation", {"prompt": "x", "chosen": "y", "rejected": "z"}),
        ("weights of samples", {"prompt": "x", "completion": "y", "weight": 2}),
        ("roles other than system, user and assistant", {"messages": [{"role": "tool", "content": "x"}]}),
        ("images, documents", {"prompt": "x", "completion": "y", "images": ["z.png"]}),
    ],
)
def test_a_row_that_is_not_supported_is_refused(line: str, row: dict[str, object], tmp_path: Path) -> None:
    assert line in " ".join(NOT_SUPPORTED.split())
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n")
    with pytest.raises(UserError):
        read_jsonl(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("line", "override"),
    [
        ("**ZeRO stages 0 and 3**", "engine.zero_stage=3"),
        ("`engine.recompute` is none or full", "engine.recompute=selective"),
        ("schedules other than cosine, linear and constant", "train.schedule=polynomial"),
        ("**Devices** other than CPUs and CUDA GPUs", "model.device=tpu"),
        ("**fp16 compute**", "model.dtype=fp16"),
        ("**Pipeline, context and expert parallelism**", "parallel.pipeline=2"),
    ],
)
def test_a_key_that_is_not_supported_is_refused(line: str, override: str) -> None:
    assert line in " ".join(NOT_SUPPORTED.split())
    with pytest.raises(UserError):
        config_of({"model": {"path": "m"}, "data": {"train": "d"}, "output": {"dir": "o"}}, [override])


# --- pages generated from the code -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", pages())
def test_the_reference_is_up_to_date(name: str) -> None:
    assert (DOCS / "reference" / name).read_text() == pages()[name], "run `make docs-reference`"
