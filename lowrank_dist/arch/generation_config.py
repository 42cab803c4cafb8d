"""The keys of generation_config.json, a model's decoding defaults. eos_token_id is applied, the others are reported.

Older models have the same keys in config.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank_dist.arch.model_files import CONFIG_FILE, GENERATION_FILE, read_model_json
from lowrank_dist.untrusted.keys import KeyRule

_NOT_APPLIED = "not applied; decoding uses its own options"

GENERATION = KeyRule(
    applied=frozenset({"eos_token_id"}),
    without_effect=frozenset(
        "_from_model_config transformers_version bos_token_id pad_token_id decoder_start_token_id use_cache "
        "use_mtp cache_implementation cache_config max_cache_len output_attentions output_hidden_states "
        "output_scores output_logits return_dict_in_generate remove_invalid_values renormalize_logits "
        "compile_config disable_compile continuous_batching_config low_memory prefill_chunk_size is_assistant "
        "num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_early_exit "
        "assistant_lookbehind target_lookbehind assistant_ensemble_weight prompt_lookup_num_tokens "
        "max_matching_ngram_size speculation_type max_time trust_remote_code chat_format user_token_id "
        "assistant_token_id".split()
    ),
    unapplied=dict.fromkeys(
        "do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff max_length "
        "max_new_tokens min_length min_new_tokens repetition_penalty encoder_repetition_penalty "
        "no_repeat_ngram_size encoder_no_repeat_ngram_size length_penalty exponential_decay_length_penalty "
        "diversity_penalty penalty_alpha num_beams num_beam_groups early_stopping num_return_sequences "
        "bad_words_ids forced_bos_token_id forced_eos_token_id force_words_ids constraints suppress_tokens "
        "begin_suppress_tokens sequence_bias stop_strings token_healing guidance_scale watermarking_config "
        "dola_layers".split(),
        _NOT_APPLIED,
    ),
    neutral={
        **dict.fromkeys(("do_sample", "early_stopping", "token_healing"), (False,)),
        **dict.fromkeys(("min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0,)),
        **dict.fromkeys(("diversity_penalty", "epsilon_cutoff", "eta_cutoff"), (0.0,)),
        "temperature": (1.0,),
        "top_k": (50,),
        "top_p": (1.0,),
        "typical_p": (1.0,),
        "repetition_penalty": (1.0,),
        "encoder_repetition_penalty": (1.0,),
        "length_penalty": (1.0,),
        "num_beams": (1,),
        "num_beam_groups": (1,),
        "num_return_sequences": (1,),
        "max_length": (20,),
        "guidance_scale": (1.0,),
    },
)


def generation_notes(folder: Path) -> list[str]:
    """Return a line for each decoding option of a model folder that is not applied.

    Raises UserError for a malformed file.
    """
    own = folder / GENERATION_FILE
    file = own if own.is_file() else folder / CONFIG_FILE
    values: dict[str, Any] = read_model_json(
        file, "a Hugging Face model folder has one, so download the model completely"
    )
    return GENERATION.notes(values if file == own else _of_decoding(values), str(file))


def _of_decoding(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key in GENERATION.unapplied}
