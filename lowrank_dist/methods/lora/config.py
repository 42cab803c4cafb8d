"""The section `lora` of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self, TypeAlias

from pydantic import Discriminator, Field, Tag

from lowrank_dist.sections.section import EndPattern, MethodSection, Pattern, YamlFolder

Rank: TypeAlias = Annotated[int, Field(ge=1, le=1024)]
Alpha: TypeAlias = Annotated[float, Field(gt=0)]
# An explicit discriminator: a validation error then names only the branch that the user meant.
Targets: TypeAlias = Annotated[
    Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1), Tag("names")]
    | Annotated[Pattern, Tag("pattern")],
    Discriminator(lambda value: "names" if isinstance(value, list) else "pattern"),
]


class LoraConfig(MethodSection):
    """Low-rank updates: their factors and initial values."""

    shaping = frozenset({"rank", "targets", "rank_pattern", "dora"})

    rank: Rank = Field(8, description="rank r of a factor pair, an integer from 1 to 1024")
    alpha: Alpha = Field(16.0, description="number above 0; the update is multiplied by alpha/rank")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="probability, at least 0 and below 1, that an element of an adapted input is dropped",
    )
    targets: Targets = Field(
        "all-linear", description="list of module names ([q_proj, v_proj]), all-linear, or one regular expression"
    )
    dora: bool = Field(
        False, description="true (train a magnitude for each row of the adapted weights as well) or false"
    )
    rslora: bool = Field(False, description="true (scale by alpha/sqrt(rank)) or false")
    rank_pattern: dict[EndPattern, Rank] = Field(
        {}, description="mapping from module path or regular expression to a rank from 1 to 1024"
    )
    alpha_pattern: dict[EndPattern, Alpha] = Field(
        {}, description="mapping from module path or regular expression to an alpha above 0"
    )
    init_from: YamlFolder | None = Field(
        None,
        description="folder of a PEFT LoRA adapter to start from, or null; it sets every key of lora except dropout",
    )

    @property
    def starts_from(self) -> Path | None:
        return self.init_from

    def resumed(self, saved: Mapping[str, Any]) -> Self:
        """Return the section with the values that the checkpoint took over from the adapter in init_from.

        The adapter itself is not read again, since it may be gone by now. Keys given in the config win.
        """
        if self.init_from is None or saved.get("init_from") != str(self.init_from):
            return self
        given = {key: getattr(self, key) for key in self.model_fields_set}
        return self.model_validate({**saved, **given})
