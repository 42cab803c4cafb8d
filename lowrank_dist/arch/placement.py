"""The placement of factors on linears: a pure function of the architecture and the `lora` section."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.rows import Linear, LinearLayout
from lowrank_dist.arch.tensors import module_paths
from lowrank_dist.errors import UserError, some_of
from lowrank_dist.untrusted.patterns import PATH_END, Patterns

ALL_LINEAR = "all-linear"
Value = TypeVar("Value", int, float)


@dataclass(frozen=True)
class FactorSpec:
    """One pair (A, B) on one Hugging Face module, or on a part of one (q_proj inside GPT-2's c_attn).

    path: the module as users and PEFT name it. export_path: the module in the checkpoint, with `export_rows` rows; this
    factor's rows begin at `export_row`. adapter_rank: r. scale: s. parts: (index of a part of the fused linear, first
    row of that part in this factor's B). `rows` × `in_features` is the shape of ΔW = s·B·A.
    """

    path: str
    export_path: str
    export_row: int
    export_rows: int
    adapter_rank: int
    alpha: float
    scale: float
    rslora: bool
    rows: int
    in_features: int
    parts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LinearPlacement:
    """The factors of one Megatron linear of one layer. They share its input and therefore one dropout mask."""

    layer: int
    linear: str
    layout: Linear
    factors: tuple[FactorSpec, ...]


@dataclass(frozen=True)
class LoraRules:
    """The keys of the `lora` section that placement needs (see methods/lora/config.py). rank: r."""

    rank: int
    alpha: float
    targets: str | Sequence[str]
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)


def place_factors(architecture: Architecture, rules: LoraRules) -> tuple[LinearPlacement, ...]:
    """Return all adapted linears, in execution order.

    Raises UserError for a target or pattern that matches nothing, for a target that matches a module without factors
    (lm_head, embeddings, norms), and for two targets that name the same weights.
    """
    matcher = _Matcher(rules, architecture)
    placements = []
    for layer, kind in enumerate(architecture.layers):
        for linear, layout in kind.linears.items():
            factors = tuple(
                _spec(candidate, layout, rules, matcher)
                for candidate in _candidates(layout, layer)
                if matcher.targets(candidate)
            )
            _refuse_overlap(factors)
            if factors:
                placements.append(LinearPlacement(layer, linear, layout, factors))
    matcher.refuse_unused()
    matcher.refuse_unadaptable()
    return tuple(placements)


@dataclass(frozen=True)
class _Candidate:
    path: str
    export_path: str
    whole: bool
    parts: tuple[int, ...]


def _candidates(layout: LinearLayout, layer: int) -> Iterator[_Candidate]:
    """Yield every module, or part of a module, that a target may name inside this linear."""
    if layout.whole is not None:
        path = layout.parts[0].path.format(layer=layer)
        yield _Candidate(path, path, True, tuple(range(len(layout.parts))))
    for index, part in enumerate(layout.parts):
        path = part.path.format(layer=layer)
        named = f"{path.rpartition('.')[0]}.{part.name}" if layout.whole is not None else path
        yield _Candidate(named, path, layout.whole is None, (index,))


class _Matcher:
    """Matches module paths against the targets and patterns, and records which of them matched."""

    def __init__(self, rules: LoraRules, architecture: Architecture) -> None:
        self._architecture = architecture
        self._rules = rules
        targets = rules.targets
        self._patterns = Patterns("lora")
        self._tests = (targets,) if isinstance(targets, str) else tuple(dict.fromkeys(targets))
        self._expression = targets if isinstance(targets, str) and targets != ALL_LINEAR else None
        self._used: set[tuple[str, str]] = set()
        # (key, pattern) → the earlier patterns that count for modules that this pattern matches too.
        self._shadowed: dict[tuple[str, str], dict[str, None]] = {}

    def targets(self, candidate: _Candidate) -> bool:
        hits = self._hits(candidate.path, candidate.whole)
        self._used.update(("lora.targets", name) for name in hits)
        return bool(hits)

    def _hits(self, path: str, whole_linear: bool) -> list[str]:
        """Return the targets that name the module at `path`. all-linear names whole linears, not parts of one."""
        if self._expression is not None:
            return [self._expression] if self._patterns.fullmatch(self._expression, path) else []
        return [
            name
            for name in self._tests
            if (whole_linear if name == ALL_LINEAR else path == name or path.endswith(f".{name}"))
        ]

    def rank(self, path: str) -> int:
        return self._first("lora.rank_pattern", self._rules.rank_pattern, path, self._rules.rank)

    def alpha(self, path: str) -> float:
        return self._first("lora.alpha_pattern", self._rules.alpha_pattern, path, self._rules.alpha)

    def _first(self, key: str, values: Mapping[str, Value], path: str, otherwise: Value) -> Value:
        # PEFT's rule for pattern keys: a regular expression for the end of the path, and the first that matches counts.
        found = [name for name in values if self._patterns.fullmatch(name, path, PATH_END)]
        if not found:
            return otherwise
        self._used.add((key, found[0]))
        for name in found[1:]:
            self._shadowed.setdefault((key, name), {})[found[0]] = None
        return values[found[0]]

    def refuse_unadaptable(self) -> None:
        """Raise UserError for a target that names a module with weights that cannot have factors."""
        reached = self._unadaptable()
        if reached:
            each = "; ".join(f"{name!r} matches {some_of(paths)}" for name, paths in reached.items())
            raise UserError(
                f"lora.targets: {each}, which cannot have factors in this {self._architecture.family} model; name "
                f"only the linears of its layers ({', '.join(self._leaves())})"
            )

    def _unadaptable(self) -> dict[str, list[str]]:
        """Return target → the modules that it names and that cannot have factors: lm_head, embeddings, norms."""
        reached: dict[str, list[str]] = {}
        for path in sorted(module_paths(self._architecture) - self._architecture.linear_modules()):
            for name in self._hits(path, whole_linear=False):
                reached.setdefault(name, []).append(path)
        return reached

    def _leaves(self) -> list[str]:
        """Return the last part of every module path that a target may name, sorted."""
        return sorted(
            {
                candidate.path.rpartition(".")[2]
                for kind in self._architecture.kinds
                for layout in kind.linears.values()
                for candidate in _candidates(layout, 0)
            }
        )

    def refuse_unused(self) -> None:
        sections = (
            ("lora.targets", self._tests),
            ("lora.rank_pattern", tuple(self._rules.rank_pattern)),
            ("lora.alpha_pattern", tuple(self._rules.alpha_pattern)),
        )
        idle = [(key, name) for key, names in sections for name in names if (key, name) not in self._used]
        told = {each: reason for each in idle if (reason := self._reason_for_idling(*each))}
        unused = [f"{key}: {name!r}" for key, name in idle if (key, name) not in told]
        if told:
            also = [f"{each} matches no linear" for each in unused]
            raise UserError("; ".join([*(f"{key}: {name!r} {reason}" for (key, name), reason in told.items()), *also]))
        if not unused:
            return
        example = next(_candidates(next(iter(self._architecture.layers[0].linears.values())), 0)).path
        raise UserError(
            f"{'; '.join(unused)} matches no linear of this {self._architecture.family} model. It has "
            f"{', '.join(self._leaves())} in {len(self._architecture.layers)} layers (for example {example}); give a "
            "list of such names or ends of paths, a regular expression for the whole path, or "
            f"{ALL_LINEAR!r}{self._note_on_unadaptable(unused)}"
        )

    def _reason_for_idling(self, key: str, name: str) -> str | None:
        """Return why a pattern of ranks or alphas has no effect, with the remedy; None where it matches no linear."""
        if key == "lora.targets":
            return None
        if before := self._shadowed.get((key, name)):
            first = ", ".join(map(repr, before))
            return f"is shadowed by {first}: the first pattern that matches counts; put it before that, or remove it"
        paths = [
            candidate.path
            for layer, kind in enumerate(self._architecture.layers)
            for layout in kind.linears.values()
            for candidate in _candidates(layout, layer)
            if self._patterns.fullmatch(name, candidate.path, PATH_END)
        ]
        if not paths:
            return None
        return f"matches only {some_of(paths)}, which lora.targets leaves out; add them to it, or remove the pattern"

    def _note_on_unadaptable(self, unused: Sequence[str]) -> str:
        """Return a sentence on the modules that unused targets name and that are never adapted; empty where none is."""
        reached = self._unadaptable()
        paths = [path for name, found in reached.items() if f"lora.targets: {name!r}" in unused for path in found]
        if not paths:
            return ""
        return f". {some_of(paths)} {'are' if len(paths) > 1 else 'is'} never adapted, only the linears of layers are"


def _spec(candidate: _Candidate, layout: LinearLayout, rules: LoraRules, matcher: _Matcher) -> FactorSpec:
    rank, alpha = matcher.rank(candidate.path), matcher.alpha(candidate.path)
    members = [layout.parts[index] for index in candidate.parts]
    first = min(part.offset for part in members)
    return FactorSpec(
        path=candidate.path,
        export_path=candidate.export_path,
        export_row=first,
        export_rows=layout.tensor_rows(members[0].path),
        adapter_rank=rank,
        alpha=alpha,
        scale=alpha / (math.sqrt(rank) if rules.rslora else rank),
        rslora=rules.rslora,
        rows=sum(part.rows for part in members),
        in_features=layout.in_features,
        parts=tuple((index, layout.parts[index].offset - first) for index in candidate.parts),
    )


def _refuse_overlap(factors: Sequence[FactorSpec]) -> None:
    seen: dict[int, FactorSpec] = {}
    for factor in factors:
        for part, _ in factor.parts:
            if part in seen:
                raise UserError(
                    f"lora.targets: {seen[part].path} and {factor.path} name the same weights; target one of them"
                )
            seen[part] = factor
