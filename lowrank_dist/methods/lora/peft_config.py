"""PEFT's adapter_config.json: the smallest config that describes an adapter exactly, and a reader of any config.

Matching follows PEFT 0.21 (`tuners_utils.check_target_module_exists`, `utils.other.get_pattern_key`).
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank_dist.arch.placement import ALL_LINEAR
from lowrank_dist.arch.wrappers import TEXT
from lowrank_dist.errors import UserError
from lowrank_dist.formats.foreign import refuse_foreign_folder
from lowrank_dist.untrusted.json import brief, read_object, typed_value
from lowrank_dist.untrusted.keys import EMPTY, KeyRule
from lowrank_dist.untrusted.patterns import Patterns

# PEFT's defaults of absent keys.
_DEFAULTS: Mapping[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "task_type": None,
    "init_lora_weights": True,
    "base_model_name_or_path": None,
}
_MORE = "more than s·B·A"
KEYS = KeyRule(
    applied=frozenset({*_DEFAULTS, "peft_type"}),
    # These change the initialisation or training of factors, but not which saved ones apply or what they compute.
    without_effect=frozenset(
        "auto_mapping inference_mode peft_version revision megatron_config megatron_core loftq_config eva_config "
        "corda_config lora_ga_config qalora_group_size runtime_config ensure_weight_tying merge_weights "
        "velora_config monteclora_config".split()
    ),
    refused=dict.fromkeys(
        "modules_to_save trainable_token_indices target_parameters layer_replication lora_bias use_qalora use_bdlora "
        "alora_invocation_tokens arrow_config kasa_config enable_lora".split(),
        _MORE,
    ),
    neutral=dict.fromkeys(("lora_bias", "use_qalora"), (False,)),
    nothing=EMPTY,
)
# Values of init_lora_weights, in any case of letters, that leave the base as it is. Others (pissa, olora, corda, loftq,
# lora_ga, …) change it, so that s·B·A is not the whole update. MiCA (arXiv 2604.01694) starts from B of W's left
# singular vectors and A = 0, and trains A alone.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_LARGEST = 1e30
OUTPUT_LAYER = "lm_head"
_ANEW = "write the adapter again"
# PEFT shortens target_modules from this number of names on (MIN_TARGET_MODULES_FOR_OPTIMIZATION).
_SHORTENED_FROM = 20
# PEFT's regular expressions around a key of rank_pattern or alpha_pattern, around a name in layers_pattern, and for a
# layer's number without layers_pattern.
_END_OF_PATH = r"(.*\.)?({})$"
_BEFORE_LAYER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
_ANY_LAYERS = r".*?\.[^.]*\.(?P<idx>\d+)\."


@dataclass(frozen=True)
class PeftConfig:
    """The content of adapter_config.json for a LoRA adapter. rank (r) and alpha apply where no pattern matches.

    targets: module paths or ends of them, or one regular expression for the whole path. "all-linear" is any linear but
    the output layer. excluded: modules in the same form, which are never targets. layers: numbers of the layers to
    which a target that is only the end of a path is limited; empty = all. layer_patterns: expressions for the path
    before a layer's number. rank_pattern, alpha_pattern: regular expression → value. An expression must match a whole
    module path or what follows one of its dots; the first that matches counts. matching: the matcher that all
    expressions of the file go through.
    """

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    dora: bool
    fan_in_fan_out: bool
    base: str
    targets: tuple[str, ...] | str
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    excluded: tuple[str, ...] | str = ()
    layers: tuple[int, ...] = ()
    layer_patterns: tuple[str, ...] = ()
    matching: Patterns = field(default_factory=lambda: Patterns("adapter_config.json"), compare=False, repr=False)

    @property
    def all_linear(self) -> bool:
        """Return whether the targets are "all-linear". `adapts` then expects a linear."""
        return isinstance(self.targets, str) and self.targets.lower() == ALL_LINEAR

    @property
    def narrowing(self) -> dict[str, Any]:
        """The keys that narrow target_modules and that are set."""
        values = {
            "exclude_modules": self.excluded,
            "layers_to_transform": self.layers,
            "layers_pattern": self.layer_patterns,
        }
        return {key: value for key, value in values.items() if value}

    def rank_of(self, module: str) -> int:
        """Return the rank that PEFT gives `module`."""
        return self._first_match(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Return the alpha that PEFT gives `module`."""
        return self._first_match(self.alpha_pattern, module, self.alpha)

    def adapts(self, module: str) -> bool:
        """Return whether PEFT would put factors on `module`. With "all-linear", `module` must be a linear."""
        if self._names(self.excluded, module):
            return False
        if self.all_linear:
            return module != OUTPUT_LAYER
        if not self.layers or isinstance(self.targets, str):
            return self._names(self.targets, module)
        # A whole path matches in any layer.
        return module in self.targets or (self._names(self.targets, module) and self._layer_of(module) in self.layers)

    def _layer_of(self, module: str) -> int | None:
        forms = [(pattern, _BEFORE_LAYER) for pattern in self.layer_patterns] or [("", _ANY_LAYERS)]
        match = next(filter(None, (self.matching.match(pattern, module, form) for pattern, form in forms)), None)
        return None if match is None or match["idx"] is None else int(match["idx"])

    def _names(self, targets: tuple[str, ...] | str, module: str) -> bool:
        """Return whether `targets`, a list of paths and ends or a regular expression, matches the module."""
        if isinstance(targets, str):
            return self.matching.fullmatch(targets, module)
        return any(module == target or module.endswith(f".{target}") for target in targets)

    def _first_match(self, pattern: Mapping[str, Any], module: str, otherwise: Any) -> Any:
        values = (value for key, value in pattern.items() if self.matching.match(key, module, _END_OF_PATH))
        return next(values, otherwise)

    def to_json(self) -> str:
        """Return the text of adapter_config.json."""
        whole = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.rank,
            "lora_alpha": _number(self.alpha),
            "lora_dropout": self.dropout,
            "target_modules": self.targets if isinstance(self.targets, str) else list(self.targets),
            **self.narrowing,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": {key: _number(alpha) for key, alpha in self.alpha_pattern.items()},
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "bias": "none",
            "fan_in_fan_out": self.fan_in_fan_out,
            "modules_to_save": None,
            "init_lora_weights": True,
            "inference_mode": True,
        }
        return json.dumps(whole, indent=2, sort_keys=True) + "\n"


def describe(
    sizes: Mapping[str, tuple[int, float]],
    modules: Collection[str],
    *,
    dropout: float,
    rslora: bool,
    dora: bool,
    fan_in_fan_out: bool,
    base: str,
) -> PeftConfig:
    """Return the smallest config with which PEFT adapts exactly the modules of `sizes` (module → rank and alpha).

    modules: the path of every module of the base that has weights. A target is the last part of a path ("q_proj") or
    the last two ("attn.c_proj") where these match no other module; otherwise it is the whole path.
    In a model of images and text it always is: the part for images has modules with the same ends.
    """
    ranks = {module: rank for module, (rank, _) in sizes.items()}
    alphas = {module: alpha for module, (_, alpha) in sizes.items()}
    inside = any(module.startswith(TEXT) for module in modules)
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    config = PeftConfig(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rslora=rslora,
        dora=dora,
        fan_in_fan_out=fan_in_fan_out,
        base=base,
        targets=tuple(sorted(sizes if inside else set(_short_names(sizes, set(modules) - set(sizes)).values()))),
        rank_pattern=_pattern(ranks, rank),
        alpha_pattern=_pattern(alphas, alpha),
    )
    assert all(config.adapts(module) == (module in sizes) for module in {*modules, *sizes}), "targets are not exact"
    assert all((config.rank_of(module), config.alpha_of(module)) == size for module, size in sizes.items())
    return config


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return pattern keys that give each module its value. The default needs no key, and no two keys overlap."""
    pattern = {}
    for value in sorted(set(values.values()) - {default}):
        same = [module for module in values if values[module] == value]
        names = _short_names(same, [module for module in values if values[module] != value])
        pattern.update({re.escape(name): value for name in sorted(set(names.values()))})
    return pattern


def _short_names(selected: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """Return each selected path → its shortest end (one part, two parts, or all) that no path of `others` ends with."""
    taken = {_end(other, depth) for other in others for depth in (1, 2)}
    return {
        module: next((end for end in (_end(module, 1), _end(module, 2)) if end not in taken), module)
        for module in selected
    }


def _end(module: str, depth: int) -> str:
    return ".".join(module.split(".")[-depth:])


def _most_common(values: Collection[Any]) -> Any:
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], -value))


def _number(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha


def read_config(path: Path) -> PeftConfig:
    """Read the adapter_config.json of any plain LoRA or DoRA adapter.

    Raises UserError, with file and key, for a method other than LoRA, for options that make the update more than s·B·A
    and magnitudes (biases, fully trained modules, a changed base, …), and for invalid values.
    """
    values = {**_DEFAULTS, **read_object(path, _ANEW)}
    _refuse_more_than_lora(values, path)
    matching = Patterns(path)
    targets = _module_names(values["target_modules"], matching, path, "target_modules")
    excluded = values["exclude_modules"]
    layers, layer_patterns = _layers(values, targets, matching, path)
    return PeftConfig(
        rank=_rank(values["r"], path, "r"),
        alpha=_finite(values["lora_alpha"], path, "lora_alpha"),
        dropout=_finite(values["lora_dropout"], path, "lora_dropout"),
        rslora=_is_true(values["use_rslora"], path, "use_rslora"),
        dora=_is_true(values["use_dora"], path, "use_dora"),
        fan_in_fan_out=_is_true(values["fan_in_fan_out"], path, "fan_in_fan_out"),
        base=typed_value(values, "base_model_name_or_path", str, path, _ANEW) or "",
        targets=targets,
        rank_pattern={
            key: _rank(rank, path, f"rank_pattern.{key}")
            for key, rank in _regexes(values, "rank_pattern", matching, path)
        },
        alpha_pattern={
            key: _finite(alpha, path, f"alpha_pattern.{key}")
            for key, alpha in _regexes(values, "alpha_pattern", matching, path)
        },
        excluded=() if excluded in (None, [], "") else _module_names(excluded, matching, path, "exclude_modules"),
        layers=layers,
        layer_patterns=layer_patterns,
        matching=matching,
    )


def key_notes(path: Path) -> list[str]:
    """Return a line that names the unknown keys of an adapter_config.json, or no line."""
    return KEYS.notes(read_object(path, _ANEW), str(path))


def _refuse_more_than_lora(values: Mapping[str, Any], path: Path) -> None:
    method = values["peft_type"] if "peft_type" in values else None
    if method != "LORA":
        refuse_foreign_folder(path.parent)
        raise UserError(f"{path}: peft_type is {brief(method)}; give an adapter of type LORA")
    problems = [f"{key}: {brief(values[key])}" for key in KEYS.refusals(values)]
    if values["bias"] != "none":
        problems.append(f"bias: {brief(values['bias'])} (must be 'none')")
    if values["task_type"] not in (None, "CAUSAL_LM"):
        problems.append(f"task_type: {brief(values['task_type'])} (must be CAUSAL_LM)")
    start = values["init_lora_weights"]
    if (start.lower() if isinstance(start, str) else start) not in _STARTS:
        problems.append(
            f"init_lora_weights: {brief(start)} (changes the base; convert it with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=…))"
        )
    if problems:
        raise UserError(f"{path}: only updates s·B·A are supported, but these keys ask for more: {'; '.join(problems)}")


def _module_names(value: Any, matching: Patterns, path: Path, key: str) -> tuple[str, ...] | str:
    if isinstance(value, str):
        matching.require(value, key)
        return value
    if isinstance(value, list) and value and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    raise UserError(f"{path}: {key} must be a list of module names or a regular expression, found {brief(value)}")


def _layers(
    values: Mapping[str, Any], targets: tuple[str, ...] | str, matching: Patterns, path: Path
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return `layers` and `layer_patterns`.

    Raises UserError for combinations that PEFT refuses, and for target lists so long that PEFT shortens them.
    """
    value, patterns = values["layers_to_transform"], values["layers_pattern"]
    found = f"{path}: layers_to_transform: {brief(value)}, layers_pattern: {brief(patterns)}"
    if isinstance(targets, str) and not (value is None and patterns is None):
        raise UserError(f"{found}: PEFT supports them only with a list of target_modules; write the names as a list")
    layers = [] if value is None else value if isinstance(value, list) else [value]
    patterns = [] if patterns in (None, "") else [patterns] if isinstance(patterns, str) else patterns
    if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in layers):
        raise UserError(f"{found}: layers_to_transform must be a layer number or a list of layer numbers")
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError(f"{found}: layers_pattern must be the module name of the layers, or a list of such names")
    if patterns and value is None:
        raise UserError(
            f"{found}: PEFT supports layers_pattern only together with layers_to_transform; remove it, or give both"
        )
    if layers and len(set(targets)) >= _SHORTENED_FROM:
        raise UserError(
            f"{found}: PEFT shortens a list of {_SHORTENED_FROM} or more target_modules, which changes the layers "
            "that full paths select; remove layers_to_transform and name every module"
        )
    for pattern in patterns:
        matching.require(pattern, "layers_pattern", _BEFORE_LAYER)
    return tuple(layers), tuple(patterns)


def _regexes(values: Mapping[str, Any], key: str, matching: Patterns, path: Path) -> list[tuple[str, Any]]:
    pattern = {} if values[key] is None else values[key]
    if not isinstance(pattern, dict):
        raise UserError(f"{path}: {key} must map module names to numbers, found {brief(pattern)}")
    for name in pattern:
        matching.require(name, key, _END_OF_PATH)
    return list(pattern.items())


def _rank(value: Any, path: Path, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{path}: {key} must be an integer of at least 1, found {brief(value)}")
    return value


def _finite(value: Any, path: Path, key: str) -> float:
    # The comparison is false for NaN too, and works for integers too large for a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST < value < _LARGEST:
        raise UserError(f"{path}: {key} must be a finite number, found {brief(value)}")
    return float(value)


def _is_true(value: Any, path: Path, key: str) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{path}: {key} must be true or false, found {brief(value)}")
    return value
