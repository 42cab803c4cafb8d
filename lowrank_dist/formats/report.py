"""The report of an inspection, from which both text and JSON are made."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from lowrank_dist.errors import UserError

T = TypeVar("T")
P = ParamSpec("P")


@dataclass
class Report:
    """kind: adapter, checkpoint, run or model. facts: name_of_fact → scalar, list or mapping of these, in order.

    tables: name → rows with the same keys. warnings: what works but should be known. problems: what is broken, each
    with file, key and remedy.
    """

    path: Path
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def verifies(self) -> bool:
        return not self.problems

    def read(self, where: Path, reader: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What `reader` returns, or None with the reason (one a line of a UserError) among the problems."""
        try:
            return reader(*args, **kwargs)
        except UserError as error:
            self.problems += [line for line in str(error).splitlines() if line.strip()]
        except Exception as error:  # files are anyone's: whatever they make a reader raise is a finding, not a crash
            self.problems.append(f"{where} cannot be read ({one_line(error)}): write or download it again")
        return None

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values. JSON has no NaN or infinity: they are text."""
        whole = {
            "path": self.path,
            "kind": self.kind,
            "verifies": self.verifies,
            "facts": self.facts,
            "tables": self.tables,
            "warnings": self.warnings,
            "problems": self.problems,
        }
        return _jsonable(whole)


def one_line(error: Exception) -> str:
    """The message in a line; with its type where it is no message for users."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
