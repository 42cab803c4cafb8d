"""Write docs/reference/config.md, commands.md and other-trainers.md from the code: `make docs-reference`."""

from __future__ import annotations

import ast
from pathlib import Path

from lowrank_dist.cli.main import app
from lowrank_dist.cli.reference import commands_to_markdown
from lowrank_dist.config.reference import reference, to_markdown
from lowrank_dist.sections import synonyms

ROOT = Path(__file__).parents[1]
_NOTICE = "<!-- Made from the code by `make docs-reference`; edit the code. -->\n"
_CONFIG = """\
# Configuration

A run is described by one YAML file, with a mapping for each section below. Any key can be given on the command line
instead, as `section.key=value` with a value as in YAML; the command line wins. `lowrank-dist config SECTION` prints the
same in a terminal.

    method: lora
    model: {path: /models/llama-3.1-8b}
    lora: {rank: 16, targets: all-linear}
    data: {train: train.jsonl}
    output: {dir: runs/first}

A run reads the section of its own `method` alone. The resolved configuration, with every key, is in `config.yaml` of
the [run folder](files.md).

"""
_COMMANDS = """\
# Commands

Training is a script, since a launcher starts it once for each rank. The commands beside it are subcommands of
`lowrank-dist`; a mistake in the input is one message and exit code 2.

"""
_TRAINERS = """\
# Keys of other trainers

Keys of PEFT, the Hugging Face Trainer, LLaMA-Factory, Axolotl, Megatron and DeepSpeed that have a counterpart here, or
are missed. An error on one of them names ours, or says why there is none. A how-to page moves
[a whole configuration](../how-to/coming-from-peft-llama-factory-megatron.md); [Configuration](config.md) has all of our
keys. –: there is none.

"""


def pages() -> dict[str, str]:
    """Return the generated pages: file below docs/reference → its text."""
    rows = (*synonyms.ROW_KEYS, *synonyms.MESSAGE_KEYS)
    trainers = f"{synonyms.to_markdown(synonyms.CONFIG_KEYS)}\n## Keys of data rows\n\n{synonyms.to_markdown(rows)}"
    training = ast.get_docstring(ast.parse((ROOT / "launch" / "train.py").read_text(encoding="utf-8"))) or ""
    return {
        "config.md": _NOTICE + _CONFIG + to_markdown(reference()),
        "commands.md": f"{_NOTICE}{_COMMANDS}## launch/train.py\n\n{training}\n\n{commands_to_markdown(app)}",
        "other-trainers.md": f"{_NOTICE}{_TRAINERS}## Keys of a configuration\n\n{trainers}",
    }


if __name__ == "__main__":
    for name, text in pages().items():
        (ROOT / "docs" / "reference" / name).write_text(text, encoding="utf-8")
