"""Published models without their weights: shapes/<name>.json is a config.json with all that a plan needs of one.

Sources: the models' own config.json files; for GPT-3, Brown et al. 2020, table 2.1, with GPT-2's vocabulary.
"""

import difflib
from pathlib import Path
from typing import Any

from lowrank_dist.arch.config_json import config_file, read_config
from lowrank_dist.errors import UserError

_SHAPES = Path(__file__).parent / "shapes"
BUILT_IN = tuple(sorted(file.stem for file in _SHAPES.glob("*.json")))


def built_in_config(name: str) -> dict[str, Any]:
    """The config.json of a built-in shape, as a dict."""
    return read_config(_SHAPES / f"{name}.json")


def find_config(what: str) -> Path:
    """The config.json of a built-in shape, of a model folder, or that file itself. UserError for anything else."""
    if what in BUILT_IN:
        return _SHAPES / f"{what}.json"
    path = Path(what)
    if path.exists():
        return config_file(path)
    match = difflib.get_close_matches(what.lower(), BUILT_IN, n=1)
    meant = f"did you mean {match[0]}? " if match else ""
    raise UserError(
        f"{what!r} is no shape, model folder or file: {meant}The shapes are {', '.join(BUILT_IN)}; "
        "any other model is planned from its folder or its config.json"
    )
