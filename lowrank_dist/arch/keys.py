"""One key of config.json: what it may hold, and what it means where it is missing."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from lowrank_dist.errors import UserError
from lowrank_dist.untrusted.json import brief


def is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether the value is a number that a float can hold: JSON has longer integers, and NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


# No model comes near; each layer takes memory here before anything else is known of it.
MOST_LAYERS = 10_000
# Each number up to it is tried as a tensor-parallel size.
MOST_HEADS = 8_192
_KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "size": ("a positive integer", lambda value: is_integer(value) and value > 0),
    "depth": (f"an integer from 1 to {MOST_LAYERS}", lambda value: is_integer(value) and 0 < value <= MOST_LAYERS),
    "heads": (f"an integer from 1 to {MOST_HEADS}", lambda value: is_integer(value) and 0 < value <= MOST_HEADS),
    "even": ("a positive even integer", lambda value: is_integer(value) and value > 0 and value % 2 == 0),
    "integer": ("an integer", is_integer),
    "number": ("a number that is not negative", lambda value: is_number(value) and value >= 0),
    # A multiplier that fp32 holds, as a factor of what it holds.
    "positive": ("a number from 1e-30 to 1e30", lambda value: is_number(value) and 1e-30 <= value <= 1e30),
    "flag": ("true or false", lambda value: isinstance(value, bool)),
    "text": ("text", lambda value: isinstance(value, str)),
    "names": ("a list of texts", lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value)),
}

# No size of a model comes near; what follows from a larger one would take minutes or the memory of this machine.
_LARGEST = 2**31
# The default of a key that must be there: sizes are never guessed.
REQUIRED = "required"


@dataclass(frozen=True)
class Key:
    """One key of config.json: its name, its values, and what transformers takes where it is missing.

    kind: "size" is a positive integer, "depth" and "heads" one that may count these, "even" an even one, "integer" any,
    "number" not negative, "positive" above 0, "flag" true or false, "names" a list of texts.
    default: a value, REQUIRED, or None, for what follows from other keys.
    null: null is a value too, with the meaning of None. also: another name that transformers maps to this key, and
    which wins over it.
    """

    name: str
    kind: Literal["size", "depth", "heads", "even", "integer", "number", "positive", "flag", "text", "names"]
    default: object = REQUIRED
    null: bool = False
    also: str | None = None

    def read(self, values: Mapping[str, Any], where: str) -> Any:
        """The key's value among those of a config.json, or its default; UserError where neither can be had."""
        name = self.also if self.also is not None and self.also in values else self.name
        if name not in values:
            if self.default is REQUIRED:
                raise UserError(f"{where}: {name} is missing: add it as in the model's own config.json")
            return self.default
        value = values[name]
        if value is None and (self.null or self.default is None):
            return None
        description, fits = _KINDS[self.kind]
        if not fits(value):
            raise UserError(f"{where}: {name} must be {description}, not {brief(value)}")
        if self.kind not in ("number", "positive") and is_integer(value) and abs(value) >= _LARGEST:
            raise UserError(f"{where}: {name} must be below 2^31, not {value}: correct it")
        # JSON has longer integers than a tensor can be multiplied with.
        return float(value) if self.kind == "positive" else value
