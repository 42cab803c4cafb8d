"""One key of config.json: its valid values and its default."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from lowrank_dist.errors import UserError
from lowrank_dist.untrusted.json import brief


class UnsupportedModel(UserError):
    """A config.json with a family or an option that no table here expresses. The file itself may be correct."""


def is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether the value is a number that a float can hold. JSON also allows larger integers and NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


# Far above any model. Each layer takes memory before the rest of the config is checked.
MOST_LAYERS = 10_000
# `legal_tp_sizes` tries each number up to the head count as a tensor-parallel size.
MOST_HEADS = 8_192
_KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "size": ("a positive integer", lambda value: is_integer(value) and value > 0),
    "depth": (f"an integer from 1 to {MOST_LAYERS}", lambda value: is_integer(value) and 0 < value <= MOST_LAYERS),
    "heads": (f"an integer from 1 to {MOST_HEADS}", lambda value: is_integer(value) and 0 < value <= MOST_HEADS),
    "even": ("a positive even integer", lambda value: is_integer(value) and value > 0 and value % 2 == 0),
    "integer": ("an integer", is_integer),
    "number": ("a number of at least 0", lambda value: is_number(value) and value >= 0),
    # A multiplier whose products with activations stay in the range of fp32.
    "positive": ("a number from 1e-30 to 1e30", lambda value: is_number(value) and 1e-30 <= value <= 1e30),
    "flag": ("true or false", lambda value: isinstance(value, bool)),
    "text": ("text", lambda value: isinstance(value, str)),
    "bits": (
        "a list of 0 and 1",
        lambda value: isinstance(value, list) and all(is_integer(x) and x in (0, 1) for x in value),
    ),
    "names": ("a list of texts", lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value)),
}

# Far above any model's size. Larger values would cost minutes or all memory before they fail.
_LARGEST = 2**31
# The default of a mandatory key: sizes are never guessed.
REQUIRED = "required"


@dataclass(frozen=True)
class Key:
    """One key of config.json: its name, its valid values, and transformers' default.

    kind: "size" is a positive integer, "depth" one up to MOST_LAYERS, "heads" one up to MOST_HEADS, "even" an even one;
    "integer" any integer; "number" at least 0, "positive" from 1e-30 to 1e30; "flag" true or false, "text" a string,
    "bits" a list of 0 and 1, "names" a list of strings.
    default: a value, REQUIRED, or None for a value that follows from other keys.
    null: null is a valid value and is read as None. also: another name of the key in transformers; where both are
    given, its value counts.
    """

    name: str
    kind: Literal["size", "depth", "heads", "even", "integer", "number", "positive", "flag", "text", "bits", "names"]
    default: object = REQUIRED
    null: bool = False
    also: str | None = None

    def read(self, values: Mapping[str, Any], where: str) -> Any:
        """Return the key's value in a config.json, or its default.

        Raises UserError for an invalid value and for a missing key without a default.
        """
        given = [name for name in (self.name, self.also) if name is not None and name in values]
        if not given:
            if self.default is REQUIRED:
                raise UserError(f"{where}: {self.name} is missing; add it as in the model's own config.json")
            return self.default
        return [self._checked(values[name], name, where) for name in given][-1]

    def _checked(self, value: Any, name: str, where: str) -> Any:
        if value is None and (self.null or self.default is None):
            return None
        description, fits = _KINDS[self.kind]
        if not fits(value):
            raise UserError(f"{where}: {name} must be {description}, not {brief(value)}")
        if self.kind not in ("number", "positive") and is_integer(value) and abs(value) >= _LARGEST:
            raise UserError(f"{where}: {name} must be below 2^31, not {brief(value)}; correct it")
        # JSON allows larger integers than a tensor can be multiplied with.
        return float(value) if self.kind == "positive" else value
