"""Key rules (`untrusted.keys`) of data rows, of chat messages and of tokenizer_config.json.

Other trainers and chat templates use more keys of a row than this project does. A key that would change the text that
the model sees, or the part of it that is trained, is refused where it has a value. Null and empty values are ignored:
tables exported to JSONL are full of them.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowrank_dist.arch.model_files import TOKENIZER_CONFIG_FILE, read_model_json
from lowrank_dist.untrusted.keys import EMPTY, KeyRule

_SEEN = (
    "is not supported, though the model would have to see it; put its text into the prompt or a system message, "
    "or remove the key"
)
_TRAINED = "is not supported, though it would change what is trained; remove the key or the line"
# Metadata of the sample and its origin.
_ABOUT = frozenset(
    "id ids idx index uid uuid key name source sources origin dataset dataset_name subset split category "
    "categories task task_name task_id task_type topic subject domain lang language url title author license meta "
    "metadata tag tags timestamp date created created_at updated_at version hash sha sha256 difficulty level type "
    "score scores rating quality reward num_tokens n_tokens token_count tokens_count length num_turns turns model "
    "model_name generator generated_by annotator comment comments note notes info extra conversation_id "
    "session_id thread_id message_id parent_id sample_id prompt_id row_id question_id".split()
)

ROW_KEYS = KeyRule(
    applied=frozenset({"prompt", "completion", "messages"}),
    without_effect=_ABOUT,
    refused={
        **dict.fromkeys(
            "tools functions tool_choice parallel_tool_calls documents image images video videos audio audios "
            "system system_prompt input context history chat_template chat_template_kwargs enable_thinking "
            "add_generation_prompt continue_final_message suffix".split(),
            _SEEN,
        ),
        **dict.fromkeys(
            "label labels weight weights sample_weight loss_weight mask loss_mask completion_mask assistant_masks "
            "train input_ids attention_mask".split(),
            _TRAINED,
        ),
    },
    # Values of rows that are trained with full weight.
    neutral={"label": (True,), "train": (True,), "weight": (1,), "sample_weight": (1,), "loss_weight": (1,)},
    nothing=EMPTY,
)
# A chat template could show any key of a message in the text, so unknown keys of messages are refused too.
MESSAGE_KEYS = KeyRule(
    applied=frozenset({"role", "content"}),
    without_effect=frozenset("id uid uuid index timestamp created created_at updated_at model metadata meta".split()),
    neutral={"weight": (1,), "train": (True,)},
    nothing=EMPTY,
)
# transformers applies the special-token keys to a tokenizer.json. The other keys concern slow tokenizer classes,
# padding and decoding.
TOKENIZER_KEYS = KeyRule(
    applied=frozenset(
        "chat_template added_tokens_decoder additional_special_tokens extra_special_tokens bos_token eos_token "
        "unk_token pad_token sep_token cls_token mask_token add_bos_token add_eos_token add_prefix_space "
        "split_special_tokens".split()
    ),
    without_effect=frozenset(
        "tokenizer_class backend is_local local_files_only processor_class model_max_length max_len padding_side "
        "truncation_side model_input_names name_or_path _name_or_path special_tokens_map_file tokenizer_file "
        "vocab_file merges_file transformers_version _commit_hash legacy from_slow use_fast "
        "use_default_system_prompt sp_model_kwargs spaces_between_special_tokens clean_up_tokenization_spaces "
        "errors device_map unsloth_version max_length truncation padding stride pad_to_multiple_of "
        "pad_token_type_id pad_token_id bos_token_id eos_token_id truncation_strategy return_token_type_ids "
        "verbose special_tokens tokenizer_type init_kwargs".split()
    ),
    unapplied={"auto_map": "code that comes with the tokenizer is not run"},
    neutral={"auto_map": ({},)},
)


# Texts that tokenizer classes of transformers may cut differently: start of text, spaces, digits, case, a combining
# accent.
_PROBES = ("a", "  a", "a 1234", "A", "e\u0301")
_AS_IT_IS = ("PreTrainedTokenizerFast", "TokenizersBackend")


def tokenizer_notes(path: Path) -> list[str]:
    """Return the notes on settings in a tokenizer folder's tokenizer_config.json that are not applied here."""
    folder = path.parent if path.is_file() else path
    file = folder / TOKENIZER_CONFIG_FILE
    settings = read_model_json(file, "download it again") if file.is_file() else {}
    notes = TOKENIZER_KEYS.notes(settings, str(file))
    if (folder / "tokenizer.json").is_file() and settings.get("tokenizer_class") not in _AS_IT_IS:
        notes += _note_on_class(folder)
    return notes


def _note_on_class(folder: Path) -> list[str]:
    """Return a note where transformers' AutoTokenizer cuts texts differently from tokenizer.json, which is used here.

    transformers 5 replaces the file's rules with those of the class that the folder names or that belongs to its model.
    """
    try:
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        plain = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        texts = (*_PROBES, *(f"{token}a" for token in plain.all_special_tokens))
        cuts = [(text, plain.tokenize(text), theirs.tokenize(text)) for text in texts]
    except Exception:  # of many types: it cannot read the folder, or not without code that is not run
        return []
    for text, here, there in cuts:
        if here != there:
            return [
                f"{folder}: tokenizer.json, which is used here, gives {' '.join(here)} for {text!r}, but "
                f"transformers' {type(theirs).__name__} gives {' '.join(there)}; to use the model there, set "
                f"tokenizer_class to {_AS_IT_IS[0]} in {TOKENIZER_CONFIG_FILE}"
            ]
    return []
