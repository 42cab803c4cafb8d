"""The handling of each key of a config.json: the family's table applies its own keys, the lists here cover the rest.

The lists are the same for all families. They hold every key of transformers' configuration classes that no table has
(a test compares them), and keys found in published models.
"""

from __future__ import annotations

from lowrank_dist.arch.families import Family
from lowrank_dist.arch.generation_config import GENERATION
from lowrank_dist.untrusted.keys import KeyRule

# Keys of any family that ask for something that no table here can express, with the error text.
_QUANTIZED = "quantized checkpoints are not supported; use the checkpoint in bf16, fp16 or fp32"
_REFUSED = {
    "quantization_config": _QUANTIZED,
    "compression_config": _QUANTIZED,
    "quantization": _QUANTIZED,
    "is_causal": "attention to later positions is not supported; use a checkpoint of a causal model",
    "per_layer_config": "layers of different sizes are not supported; use a checkpoint without this key",
    "transformers_weights": "another name for the weights is not supported; use model.safetensors without this key",
    "attribute_map": "other names for keys are not supported; write each value under its usual key",
    "pruned_heads": "pruned attention heads are not supported; use the checkpoint before pruning",
}
_DROPOUTS = (
    *("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "activation_dropout", "layerdrop"),
    *("hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "embd_dropout"),
    "residual_dropout",
)
_UNAPPLIED = {
    **dict.fromkeys(_DROPOUTS, "dropout of the base is not applied"),
    "auto_map": "code that comes with the model is not run; model_type alone decides",
}
# Keys of any family that change no number here, or that other code reads (bos, eos and pad tokens; decoding options).
_WITHOUT_EFFECT = frozenset(
    "architectures transformers_version _name_or_path name_or_path _model_name_or_path _commit_hash "
    "_attn_implementation _attn_implementation_autoset _attn_implementation_internal attn_implementation "
    "_flash_attn_2_enabled use_flash_attn _experts_implementation transformers.js_config torchscript tf_legacy_loss "
    "use_bfloat16 use_cache cache_implementation bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id "
    "decoder_start_token_id tokenizer_class prefix initializer_range init_std initializer_factor output_attentions "
    "output_hidden_states output_logits output_scores return_dict return_dict_in_generate gradient_checkpointing "
    "chunk_size_feed_forward pretraining_tp is_decoder tie_encoder_decoder cross_attention_hidden_size "
    "finetuning_task task_specific_params id2label label2id num_labels _num_labels problem_type classifier_dropout "
    "summary_type summary_use_proj summary_activation summary_first_dropout summary_proj_to_labels "
    "predict_special_tokens reorder_and_upcast_attn n_ctx output_past unsloth_version unsloth_fixed "
    "model_max_length is_llama_config _sliding_window_pattern".split()
)
# Values at which a key has no effect, in any family.
_NEUTRAL = {
    **dict.fromkeys(_DROPOUTS, (0.0,)),
    "auto_map": ({},),
    "attribute_map": ({},),
    "pruned_heads": ({},),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "attention_bias": (False,),
    "attention_out_bias": (False,),
    "mlp_bias": (False,),
    "use_mrope": (False,),
    "rope_interleaved": (False,),
    "use_sliding_window": (False,),
    "logits_scaling": (1.0,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "transformers_weights": ("model.safetensors", "model.safetensors.index.json"),
}
_ROPE_NAMES = frozenset(
    "rope_parameters rope_scaling rope_theta partial_rotary_factor original_max_position_embeddings".split()
)


def key_rule(family: Family) -> KeyRule:
    """Return the rule for the config.json of a family."""
    named = [*family.keys.values(), *family.window.values(), *family.no_rope.values()]
    applied = {key.name for key in named} | {key.also for key in named if key.also is not None}
    applied |= family.only.keys() | family.equal.keys() | family.absent.keys()
    if family.fixed["positions"] == "rope":
        applied |= _ROPE_NAMES
    if family.rope.local is not None and family.rope.local[0] is not None:
        applied.add(family.rope.local[0])
    return KeyRule(
        applied=frozenset(applied | {"model_type", "dtype", "torch_dtype"}),
        without_effect=_WITHOUT_EFFECT | GENERATION.applied | GENERATION.without_effect | GENERATION.unapplied.keys(),
        refused=_REFUSED,
        unapplied=_UNAPPLIED,
        neutral=_NEUTRAL,
    )
