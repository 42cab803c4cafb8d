"""Models of images and text: where the model of text lies in them, in config.json and in the names of tensors.

Only text is trained, so the tensors of images are never read. As in transformers, the text part's modules lie at
`model.language_model`, and its files have the published names or these.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lowrank_dist.arch.architecture import TensorRule
from lowrank_dist.arch.config_keys import key_rule
from lowrank_dist.arch.families import FAMILIES, OUTPUT_LAYER, Family
from lowrank_dist.arch.keys import Key, UnsupportedModel
from lowrank_dist.arch.model_files import WRAPPERS
from lowrank_dist.errors import UserError
from lowrank_dist.untrusted.json import brief
from lowrank_dist.untrusted.keys import KeyRule

TEXT = "model.language_model."
# Beginning of a tensor's name → its beginning in published files.
PUBLISHED_NAMES = ((TEXT, "language_model.model."), ("lm_head.", "language_model.lm_head."))
_IMAGES = r"(vision_tower|multi_modal_projector)\..+"
# Keys beside text_config that change no number of text.
_OF_IMAGES = frozenset(
    "vision_config image_token_index image_token_id boi_token_index boi_token_id eoi_token_index eoi_token_id "
    "mm_tokens_per_image projector_hidden_act vision_feature_layer multimodal_projector_bias spatial_merge_size "
    "vision_feature_select_strategy image_seq_length".split()
)
_APPLIED = frozenset("model_type text_config tie_word_embeddings dtype torch_dtype".split())


@dataclass(frozen=True)
class TextPart:
    """The model of text in a config.json: `values` with the keys of its family, and `where` they are, for messages.

    outer: the rule for the keys beside text_config, None for a model of text alone.
    """

    family: Family
    values: Mapping[str, Any]
    where: str
    outer: KeyRule | None = None


def text_part(values: Mapping[str, Any], where: str) -> TextPart:
    """Return the model of text in the config.json of a model of images and text, one of WRAPPERS.

    Raises UserError where text_config is missing or of a family that is not supported there.
    """
    wrapper = WRAPPERS[values["model_type"]]
    inner = values.get("text_config")
    if not isinstance(inner, dict):
        raise UserError(f"{where}: text_config must be an object, found {brief(inner)}; download the model again")
    name = inner.get("model_type", wrapper.texts[0])
    if name not in wrapper.texts:
        raise UnsupportedModel(
            f"{where}: text_config: model_type {brief(name)} is not supported in a {values['model_type']}; use a model "
            f"with one of {', '.join(wrapper.texts)}"
        )
    family = FAMILIES[name]
    outer = replace(key_rule(family), applied=_APPLIED, without_effect=key_rule(family).without_effect | _OF_IMAGES)
    for key, meaning in outer.refusals(values).items():
        raise UnsupportedModel(f"{where}: {key}: {meaning}")
    read = {**wrapper.defaults, **inner, "model_type": name}
    # transformers ties by the outer key alone. Where it is missing, published files have the lm_head that the inner one
    # asks for, and transformers does not tie one that differs.
    if values.get("tie_word_embeddings") is not None:
        read["tie_word_embeddings"] = Key("tie_word_embeddings", "flag", True).read(values, where)
    return TextPart(_inside(family, wrapper.model_class), read, f"{where}: text_config", outer)


def _inside(family: Family, model_class: str) -> Family:
    """Return the table of a family's model inside one of images and text."""
    return replace(
        family,
        model_class=model_class,
        linears={name: tuple(_renamed(path) for path in paths) for name, paths in family.linears.items()},
        tensors=tuple(
            rule if rule is OUTPUT_LAYER else TensorRule(**{**vars(rule), "hf": _renamed(rule.hf)})
            for rule in family.tensors
        ),
        ignored=(_IMAGES, *(rf"language_model\.(model\.)?{pattern}" for pattern in family.ignored)),
    )


def _renamed(name: str) -> str:
    return re.sub(r"^model\.", TEXT, name)


# The tables of all families inside models of images and text.
WRAPPED = tuple(_inside(FAMILIES[name], wrapper.model_class) for wrapper in WRAPPERS.values() for name in wrapper.texts)
