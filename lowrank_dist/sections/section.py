"""The base of every configuration section, and the field types that several of them use.

A section's model lies beside its owner (model/config.py, methods/lora/config.py, …) and imports this room alone: no
torch, so that a configuration can be checked anywhere. A field's description is the remedy in an error message.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from lowrank_dist.untrusted.files import require_nameable
from lowrank_dist.untrusted.patterns import PATH_END, require_expression


def _path(value: object) -> Path:
    # Strict mode takes no text for a path, and YAML has nothing else.
    if isinstance(value, Path) or isinstance(value, str) and value:
        return Path(require_nameable(str(value)))
    raise ValueError("a path is text that is not empty (a number as a name needs quotes)")


def _regular_expression(value: str) -> str:
    require_expression(value)
    return value


def _end_of_path(value: str) -> str:
    require_expression(value, PATH_END)
    return value


# The methods, as a run's config names them; methods/registry.py says where each lives.
MethodName: TypeAlias = Literal["lora", "full", "adapter_h", "adapter_l", "prefix", "prompt"]
YamlPath: TypeAlias = Annotated[Path, BeforeValidator(_path)]
Pattern: TypeAlias = Annotated[str, Field(min_length=1), AfterValidator(_regular_expression)]
# Of the end of a module's path, from a dot on.
EndPattern: TypeAlias = Annotated[str, Field(min_length=1), AfterValidator(_end_of_path)]


class Section(BaseModel):
    """Frozen and strict: no key beyond the model's, no value of another type, no infinity."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class MethodSection(Section):
    """The section of one method, and what others ask of any method before it is built.

    As it stands it is the section of a method that has no keys, takes no positions and can be sharded anyhow.
    shaping: keys that say which tensors are trained and how large, so that no checkpoint fits another value.
    """

    shaping: ClassVar[frozenset[str]] = frozenset()

    @property
    def virtual(self) -> int:
        """Positions that the method takes from every sequence."""
        return 0

    @property
    def starts_from(self) -> Path | None:
        """Folder of the adapter that training starts from and that completes this section, or None."""
        return None

    def reason_not_shardable(self, tp_size: int) -> str | None:
        """Return why what is trained cannot lie on `tp_size` tensor-parallel ranks, with the remedy, or None."""
        return None

    def reason_without_room(self, name: str, max_length: int) -> str | None:
        """Return why virtual positions leave no sample room in data.max_length, with the remedy, or None.

        name: of the section.
        """
        if max_length - self.virtual >= 2:
            return None
        return (
            f"{name}.length={self.virtual} takes from data.max_length={max_length}: no room is left for a sample of "
            f"two tokens; give a length of at most {max_length - 2}, or a larger data.max_length"
        )

    def resumed(self, saved: Mapping[str, Any]) -> Self:
        """Return the section with what only the run that goes on knows. saved: the checkpoint's section, as JSON."""
        return self
