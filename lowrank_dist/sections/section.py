"""The base class of all configuration sections, and the field types that several of them use.

A section's model lies beside its owner (model/config.py, methods/lora/config.py, …) and imports only this package. It
loads no torch, so that a configuration can be checked anywhere. A field's description is the remedy in an error
message.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from lowrank_dist.untrusted.files import follow_file, require_valid_path
from lowrank_dist.untrusted.patterns import PATH_END, require_expression


def _path(value: object) -> Path:
    # Pydantic's strict mode takes no text for a path, and YAML has nothing else.
    if isinstance(value, Path) or isinstance(value, str) and value:
        return Path(require_valid_path(str(value)))
    raise ValueError("a path must be text that is not empty (quote a name that is a number)")


def _regular_expression(value: str) -> str:
    require_expression(value)
    return value


def _end_of_path(value: str) -> str:
    require_expression(value, PATH_END)
    return value


# Method names in a run's config; methods/registry.py says where each lives.
MethodName: TypeAlias = Literal["lora", "full", "adapter_h", "adapter_l", "prefix", "prompt"]
YamlPath: TypeAlias = Annotated[Path, BeforeValidator(_path)]
# A folder to read: checkpoints/last and best are followed where the file system has no links.
YamlFolder: TypeAlias = Annotated[YamlPath, AfterValidator(follow_file)]
Pattern: TypeAlias = Annotated[str, Field(min_length=1), AfterValidator(_regular_expression)]
# Matches the end of a module's path, from the path's beginning or from a dot on.
EndPattern: TypeAlias = Annotated[str, Field(min_length=1), AfterValidator(_end_of_path)]


class Section(BaseModel):
    """Frozen and strict: no unknown key, no value of another type, no infinity or NaN."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class MethodSection(Section):
    """The section of one method, and what other code asks of a method before it is built.

    The defaults are those of a method that has no keys, takes no positions and can be sharded over any number of ranks.
    shaping: keys that decide which tensors are trained and how large they are; a run cannot resume if one changes.
    """

    shaping: ClassVar[frozenset[str]] = frozenset()

    @property
    def virtual_positions(self) -> int:
        """Positions that the method takes from every sequence."""
        return 0

    @property
    def starts_from(self) -> Path | None:
        """Folder of the adapter that training starts from and that fills in keys of this section, or None."""
        return None

    def reason_not_shardable(self, tp_size: int) -> str | None:
        """Return why the trained tensors cannot be sharded over `tp_size` ranks, with the remedy, or None."""
        return None

    def reason_without_room(self, name: str, max_length: int) -> str | None:
        """Return why virtual positions leave no room for a sample in data.max_length, with the remedy, or None.

        name: the section's name.
        """
        if max_length - self.virtual_positions >= 2:
            return None
        return (
            f"{name}.length={self.virtual_positions} leaves no room in data.max_length={max_length} for a sample of "
            f"two tokens; give a length of at most {max_length - 2}, or a larger data.max_length"
        )

    def resumed(self, saved: Mapping[str, Any]) -> Self:
        """Return the section for a resumed run. saved: the checkpoint's section, as JSON.

        A method that takes values from the adapter in `starts_from` overrides it: on a resume they come from `saved`,
        since that adapter may be gone.
        """
        return self
