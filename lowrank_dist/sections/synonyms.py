"""Names that other trainers give to keys of the config and of data rows, with ours: one table.

Errors on unknown keys use it to say what was meant, and docs/reference/other-trainers.md is made from it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

PEFT, HF, FACTORY, AXOLOTL, MEGATRON = "PEFT", "HF Trainer", "LLaMA-Factory", "Axolotl", "Megatron"
_ALL_HF = f"{HF}, {FACTORY}, {AXOLOTL}"
DEEPSPEED = "DeepSpeed"
_CHATS, _ALPACA, _PREFERENCES = "ShareGPT", "Alpaca", "DPO data"

# Notes of several entries.
_NOT_QUANTISED = "the base is held in bf16 or fp32"
_ATTENTION = "attention is PyTorch's scaled_dot_product_attention, which chooses its kernel"
_OPERATORS = "engine.kernels says which operators run"
_FROZEN = "embeddings, norms and lm_head are frozen beside an adapter"
_LAYERS = "lora.targets can be a regular expression of module paths"
_RANKS = "ranks are tensor and data parallel only"
_PREFERENCE = "there is no preference training"
_TEMPLATE = "the tokenizer's own chat template is used"
_TOKENISED = "the data set is tokenised at the start and held in memory"
_TRACKERS = "there is TensorBoard (output.tensorboard) and metrics.jsonl, no Weights & Biases, MLflow or Comet"


@dataclass(frozen=True)
class Synonym:
    """A key of other trainers. trainers: those that have it. ours: the key here, or None where there is none.

    note: the difference in meaning, or why there is none; empty where both mean the same. needless: what the key asks
    for is always done, or never matters here, so that it can be left out.
    """

    theirs: str
    trainers: str
    ours: str | None
    note: str = ""
    needless: bool = False

    @property
    def hint(self) -> str:
        """The end of an error on the key: the key here and the difference in meaning."""
        if self.ours is None:
            return f"{'leave it out' if self.needless else 'not supported'}: {self.note}; "
        return f"did you mean {self.ours}? " + (f"({self.note}) " if self.note else "")


def _without_ours(trainers: str, note: str, *theirs: str, needless: bool = False) -> tuple[Synonym, ...]:
    """Return entries without a key here that share a note."""
    return tuple(Synonym(name, trainers, None, note, needless) for name in theirs)


CONFIG_KEYS = (
    # The model and its numbers.
    Synonym("model_name_or_path", f"{HF}, {FACTORY}", "model.path", "a local folder; `hf download` gets one"),
    Synonym("base_model", AXOLOTL, "model.path", "a local folder; `hf download` gets one"),
    Synonym("base_model_name_or_path", PEFT, "model.path", "a local folder; `hf download` gets one"),
    Synonym("tokenizer_name_or_path", HF, "data.tokenizer"),
    Synonym("tokenizer_model", MEGATRON, "data.tokenizer"),
    Synonym("bf16", f"{_ALL_HF}, {MEGATRON}", "model.dtype", "model.dtype=bf16; what is trained stays fp32"),
    Synonym("fp16", f"{_ALL_HF}, {MEGATRON}", "model.dtype", "model.dtype=bf16 in its place: the range of fp32"),
    Synonym("torch_dtype", HF, "model.dtype", "auto, fp32 or bf16"),
    Synonym("use_cpu", HF, "model.device", "model.device=cpu"),
    *_without_ours(AXOLOTL, _NOT_QUANTISED, "load_in_4bit", "load_in_8bit", "gptq"),
    *_without_ours(FACTORY, _NOT_QUANTISED, "quantization_bit", "quantization_method", "double_quantization"),
    *_without_ours(HF, _NOT_QUANTISED, "quantization_config"),
    *_without_ours(PEFT, _NOT_QUANTISED, "loftq_config"),
    Synonym("trust_remote_code", _ALL_HF, None, "code that comes with a model is never run"),
    Synonym("tokenizer_config", AXOLOTL, "data.tokenizer"),
    Synonym("tf32", f"{HF}, {AXOLOTL}", None, "products of fp32 stay fp32"),
    Synonym("pure_bf16", FACTORY, None, "what is trained stays fp32"),
    Synonym("rope_scaling", FACTORY, None, "it is the model's own, from config.json"),
    *_without_ours(
        AXOLOTL, "the family is read from config.json", "model_type", "is_llama_derived_model", needless=True
    ),
    *_without_ours(FACTORY, _ATTENTION, "flash_attn", needless=True),
    *_without_ours(AXOLOTL, _ATTENTION, "flash_attention", "sdp_attention", "xformers_attention", needless=True),
    *_without_ours(HF, _ATTENTION, "attn_implementation", needless=True),
    *_without_ours(MEGATRON, _ATTENTION, "use_flash_attn", needless=True),
    *_without_ours(FACTORY, _OPERATORS, "use_unsloth", "enable_liger_kernel", needless=True),
    *_without_ours(HF, _OPERATORS, "use_liger_kernel", "torch_compile", needless=True),
    # The method.
    Synonym("finetuning_type", FACTORY, "method"),
    Synonym("peft_type", PEFT, "method"),
    Synonym("r", PEFT, "lora.rank"),
    Synonym("lora_r", AXOLOTL, "lora.rank"),
    Synonym("lora_rank", FACTORY, "lora.rank"),
    Synonym("lora_alpha", f"{PEFT}, {FACTORY}, {AXOLOTL}", "lora.alpha"),
    Synonym("lora_dropout", f"{PEFT}, {FACTORY}, {AXOLOTL}", "lora.dropout"),
    Synonym("target_modules", PEFT, "lora.targets"),
    Synonym("lora_target", FACTORY, "lora.targets", "a YAML list, or all-linear for `all`"),
    Synonym("lora_target_modules", AXOLOTL, "lora.targets"),
    Synonym("lora_target_linear", AXOLOTL, "lora.targets", "lora.targets=all-linear"),
    Synonym("use_rslora", f"{PEFT}, {FACTORY}", "lora.rslora"),
    Synonym("peft_use_rslora", AXOLOTL, "lora.rslora"),
    Synonym("use_dora", f"{PEFT}, {FACTORY}", "lora.dora"),
    Synonym("peft_use_dora", AXOLOTL, "lora.dora"),
    Synonym("adapter_name_or_path", FACTORY, "lora.init_from"),
    Synonym("lora_model_dir", AXOLOTL, "lora.init_from"),
    *_without_ours(PEFT, _FROZEN, "modules_to_save", "trainable_token_indices"),
    *_without_ours(FACTORY, _FROZEN, "additional_target"),
    *_without_ours(AXOLOTL, _FROZEN, "lora_modules_to_save"),
    *_without_ours(FACTORY, "new tokens would need trained embeddings", "resize_vocab", "new_special_tokens"),
    *_without_ours(AXOLOTL, "the tokenizer is taken as it is", "special_tokens", "tokens"),
    *_without_ours(PEFT, "biases stay frozen, as `none` does", "bias", "lora_bias"),
    Synonym("task_type", PEFT, None, "every run trains a causal language model (CAUSAL_LM)", needless=True),
    Synonym("inference_mode", PEFT, None, "a run trains", needless=True),
    Synonym(
        "init_lora_weights",
        PEFT,
        None,
        "A is drawn as PEFT's default does and B is zero; no PiSSA, OLoRA, LoftQ or EVA",
    ),
    *_without_ours(FACTORY, "A is drawn as PEFT's default does and B is zero", "pissa_init", "pissa_iter"),
    *_without_ours(PEFT, _LAYERS, "layers_to_transform", "layers_pattern", "exclude_modules"),
    Synonym("lora_layers_to_transform", AXOLOTL, None, _LAYERS),
    *_without_ours(PEFT, "factors are for linears of layers", "target_parameters", "layer_replication"),
    Synonym("fan_in_fan_out", PEFT, None, "it follows from the family", needless=True),
    Synonym("lora_fan_in_fan_out", AXOLOTL, None, "it follows from the family", needless=True),
    *_without_ours(FACTORY, "no layers are frozen one by one", "freeze_trainable_layers", "freeze_trainable_modules"),
    Synonym("unfrozen_parameters", AXOLOTL, None, "method=full trains every weight"),
    Synonym("prompt_tuning_init", PEFT, "prompt.init", "vocabulary or random"),
    Synonym("encoder_hidden_size", PEFT, "prefix.width"),
    Synonym("num_virtual_tokens", PEFT, "prefix.length", "for method=prompt it is prompt.length"),
    Synonym("prefix_projection", PEFT, "prefix.width", "the width of the MLP, or null for none"),
    # Ranks.
    Synonym("tensor_model_parallel_size", MEGATRON, "parallel.tensor"),
    Synonym("tensor_parallel_size", HF, "parallel.tensor"),
    Synonym("sequence_parallel", MEGATRON, "parallel.sequence", "on by default when parallel.tensor is above 1"),
    *_without_ours(MEGATRON, _RANKS, "pipeline_model_parallel_size", "expert_model_parallel_size"),
    *_without_ours(f"{AXOLOTL}, {MEGATRON}", _RANKS, "context_parallel_size"),
    *_without_ours(AXOLOTL, _RANKS, "sequence_parallel_degree"),
    *_without_ours(f"{HF}, {AXOLOTL}", "ZeRO shards what is trained (engine.zero_stage)", "fsdp", "fsdp_config"),
    *_without_ours(
        DEEPSPEED, "engine.zero_stage is the only setting of DeepSpeed", "zero_optimization", "offload_optimizer"
    ),
    # Batches.
    Synonym(
        "batch_size",
        AXOLOTL,
        "train.global_batch",
        "samples of a step over all ranks; train.micro_batch is rows per rank and microbatch",
    ),
    Synonym("train_batch_size", DEEPSPEED, "train.global_batch"),
    Synonym("train_micro_batch_size_per_gpu", DEEPSPEED, "train.micro_batch"),
    *_without_ours(
        f"{HF}, {AXOLOTL}", "the batch is given; `lowrank-dist plan` says what fits", "auto_find_batch_size"
    ),
    *_without_ours(HF, "samples are shuffled, not grouped by length", "group_by_length"),
    *_without_ours(AXOLOTL, "rows are padded to the longest of their batch", "pad_to_sequence_len"),
    Synonym(
        "per_device_train_batch_size",
        f"{HF}, {FACTORY}",
        "train.micro_batch",
        "rows per rank and microbatch; train.global_batch is the batch of a step over all ranks",
    ),
    Synonym(
        "micro_batch_size",
        f"{AXOLOTL}, {MEGATRON}",
        "train.micro_batch",
        "train.global_batch is the batch of a step over all ranks",
    ),
    Synonym("global_batch_size", MEGATRON, "train.global_batch"),
    Synonym(
        "gradient_accumulation_steps",
        _ALL_HF,
        "train.global_batch",
        "samples of a step over all ranks: micro batch × accumulation × data-parallel ranks",
    ),
    Synonym("per_device_eval_batch_size", f"{HF}, {FACTORY}", "eval.micro_batch"),
    Synonym("eval_batch_size", AXOLOTL, "eval.micro_batch"),
    # Length and rate.
    Synonym("max_steps", _ALL_HF, "train.steps"),
    Synonym("train_iters", MEGATRON, "train.steps"),
    Synonym("num_train_epochs", f"{HF}, {FACTORY}", "train.epochs"),
    Synonym("num_epochs", AXOLOTL, "train.epochs"),
    Synonym("learning_rate", _ALL_HF, "train.lr"),
    Synonym("min_lr", MEGATRON, "train.min_lr_ratio", "the last rate over the peak"),
    Synonym("lr_scheduler_type", f"{HF}, {FACTORY}", "train.schedule", "cosine, linear or constant"),
    Synonym("lr_scheduler", AXOLOTL, "train.schedule", "cosine, linear or constant"),
    Synonym("lr_decay_style", MEGATRON, "train.schedule", "cosine, linear or constant"),
    Synonym("warmup_ratio", _ALL_HF, "train.warmup_steps", "steps: the ratio × the steps of the run"),
    Synonym("lr_warmup_iters", MEGATRON, "train.warmup_steps"),
    Synonym("lr_warmup_fraction", MEGATRON, "train.warmup_steps", "steps: the fraction × the steps of the run"),
    Synonym("optim", f"{HF}, {FACTORY}", None, "the optimizer is AdamW"),
    Synonym("optimizer", f"{AXOLOTL}, {MEGATRON}", None, "the optimizer is AdamW"),
    Synonym("adam_beta1", f"{_ALL_HF}, {MEGATRON}", "train.beta1"),
    Synonym("adam_beta2", f"{_ALL_HF}, {MEGATRON}", "train.beta2"),
    Synonym("adam_epsilon", _ALL_HF, "train.eps"),
    Synonym("adam_eps", MEGATRON, "train.eps"),
    Synonym("max_grad_norm", _ALL_HF, "engine.clip"),
    Synonym("clip_grad", MEGATRON, "engine.clip"),
    *_without_ours(
        f"{FACTORY}, {AXOLOTL}", "A and B have one learning rate", "loraplus_lr_ratio", "loraplus_lr_embedding"
    ),
    *_without_ours(
        FACTORY, "the optimizer is AdamW", "use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon"
    ),
    *_without_ours(HF, "the schedule has no more settings", "lr_scheduler_kwargs"),
    *_without_ours(_ALL_HF, "no noise is added to embeddings", "neftune_noise_alpha"),
    Synonym("label_smoothing_factor", HF, None, "the loss is the likelihood of the target"),
    *_without_ours(FACTORY, _PREFERENCE, "pref_beta", "pref_loss", "pref_ftx", "ref_model", "reward_model"),
    *_without_ours(AXOLOTL, _PREFERENCE, "rl", "dpo_beta"),
    Synonym("data_seed", HF, "train.seed"),
    # Memory and speed.
    Synonym("gradient_checkpointing", f"{HF}, {AXOLOTL}", "engine.recompute", "engine.recompute=full"),
    Synonym("recompute_granularity", MEGATRON, "engine.recompute", "none or full"),
    Synonym("recompute_activations", MEGATRON, "engine.recompute", "engine.recompute=full"),
    Synonym("deepspeed", _ALL_HF, "engine.zero_stage", "1 or 2, of what is trained; there is no DeepSpeed file"),
    Synonym("ddp_timeout", f"{HF}, {FACTORY}", "engine.timeout_seconds"),
    Synonym("distributed_timeout_minutes", MEGATRON, "engine.timeout_seconds", "in seconds"),
    # Data.
    Synonym("dataset", FACTORY, "data.train", "a JSONL file"),
    Synonym("datasets", AXOLOTL, "data.train", "one JSONL file"),
    Synonym("train_file", HF, "data.train", "a JSONL file"),
    Synonym("data_path", MEGATRON, "data.train", "a JSONL file, tokenised when the run starts"),
    Synonym("train_data_path", MEGATRON, "data.train", "a JSONL file, tokenised when the run starts"),
    Synonym("eval_dataset", FACTORY, "data.eval", "a JSONL file"),
    Synonym("test_datasets", AXOLOTL, "data.eval", "a JSONL file"),
    Synonym("val_size", FACTORY, "data.eval", "a file of its own: nothing is split off data.train"),
    Synonym("val_set_size", AXOLOTL, "data.eval", "a file of its own: nothing is split off data.train"),
    Synonym("cutoff_len", FACTORY, "data.max_length", "longer samples are left out, not cut"),
    Synonym("max_seq_length", HF, "data.max_length", "longer samples are left out, not cut"),
    Synonym("sequence_len", AXOLOTL, "data.max_length", "longer samples are left out, not cut"),
    Synonym("seq_length", MEGATRON, "data.max_length", "longer samples are left out, not cut"),
    Synonym("sample_packing", AXOLOTL, "data.packing"),
    Synonym("neat_packing", FACTORY, "data.packing", "samples in a row never see each other"),
    *_without_ours(FACTORY, _TEMPLATE, "template", "default_system", needless=True),
    *_without_ours(AXOLOTL, _TEMPLATE, "chat_template", "chat_template_jinja", needless=True),
    Synonym("dataset_dir", FACTORY, "data.train", "the path of a JSONL file"),
    *_without_ours(FACTORY, "a run reads the whole of data.train; cut the file", "max_samples"),
    *_without_ours(FACTORY, "concatenate the files", "mix_strategy", "interleave_probs"),
    *_without_ours(f"{FACTORY}, {AXOLOTL}", "the data set is tokenised at the start and held in memory", "streaming"),
    *_without_ours(
        FACTORY, _TOKENISED, "overwrite_cache", "preprocessing_num_workers", "tokenized_path", needless=True
    ),
    *_without_ours(AXOLOTL, _TOKENISED, "dataset_prepared_path", "dataset_processes", needless=True),
    *_without_ours(_ALL_HF, _TOKENISED, "dataloader_num_workers", "dataloader_pin_memory", needless=True),
    *_without_ours(MEGATRON, _TOKENISED, "num_workers", needless=True),
    *_without_ours(HF, "unknown keys of a row are reported", "remove_unused_columns", needless=True),
    Synonym("train_on_inputs", AXOLOTL, None, "the loss is that of completions and assistant messages"),
    Synonym("train_on_prompt", FACTORY, None, "the loss is that of completions and assistant messages"),
    # What is written, and when.
    *_without_ours(
        FACTORY, "every run is supervised fine-tuning (ZeRO's stage is engine.zero_stage)", "stage", needless=True
    ),
    *_without_ours(
        f"{HF}, {FACTORY}", "a run trains, and evaluates where data.eval is given", "do_train", "do_eval", needless=True
    ),
    *_without_ours(f"{HF}, {FACTORY}", "`lowrank-dist evaluate` and `generate` do it", "do_predict"),
    Synonym("predict_with_generate", f"{HF}, {FACTORY}", "eval.generate", "a mapping; {} for defaults"),
    Synonym("plot_loss", FACTORY, "output.plot"),
    Synonym("save_only_model", _ALL_HF, None, "every checkpoint has the state of the optimizer, so that it resumes"),
    *_without_ours(_ALL_HF, "safetensors is the only format", "save_safetensors", needless=True),
    *_without_ours(f"{HF}, {AXOLOTL}", "upload the adapter with `hf upload`", "push_to_hub", "hub_model_id"),
    Synonym("save_strategy", _ALL_HF, "output.save_every", "steps between checkpoints"),
    Synonym("evaluation_strategy", _ALL_HF, "eval.every", "steps between evaluations"),
    Synonym("eval_on_start", HF, "eval.at_start"),
    Synonym("load_best_model_at_end", _ALL_HF, "output.publish", "best, the default: adapter/ is the best step"),
    Synonym("greater_is_better", HF, None, "it follows from eval.best", needless=True),
    *_without_ours(
        f"{HF}, {FACTORY}", "train.log_every says when", "logging_strategy", "logging_first_step", needless=True
    ),
    Synonym("logging_dir", HF, "output.tensorboard", "true or false; it lies in output.dir"),
    *_without_ours(HF, _TRACKERS, "run_name"),
    *_without_ours(AXOLOTL, _TRACKERS, "wandb_project", "wandb_entity", "wandb_name", "wandb_mode", "wandb_watch"),
    *_without_ours(AXOLOTL, _TRACKERS, "mlflow_tracking_uri", "mlflow_experiment_name", "use_comet"),
    *_without_ours(MEGATRON, _TRACKERS, "wandb_exp_name"),
    *_without_ours("sections of trackers", _TRACKERS, "wandb", "mlflow", "comet"),
    Synonym("output_dir", _ALL_HF, "output.dir"),
    Synonym("save", MEGATRON, "output.dir"),
    Synonym("overwrite_output_dir", f"{HF}, {FACTORY}", "output.overwrite", "it removes the run that lies there"),
    Synonym("save_steps", _ALL_HF, "output.save_every"),
    Synonym("save_interval", MEGATRON, "output.save_every"),
    Synonym("save_total_limit", _ALL_HF, "output.keep_last"),
    Synonym("eval_steps", _ALL_HF, "eval.every"),
    Synonym("eval_interval", MEGATRON, "eval.every"),
    Synonym("evals_per_epoch", AXOLOTL, "eval.every", "steps between evaluations"),
    Synonym("saves_per_epoch", AXOLOTL, "output.save_every", "steps between checkpoints"),
    Synonym("eval_strategy", _ALL_HF, "eval.every", "steps between evaluations"),
    Synonym("metric_for_best_model", _ALL_HF, "eval.best"),
    Synonym("early_stopping_patience", f"{HF}, {AXOLOTL}", "eval.patience"),
    Synonym("logging_steps", _ALL_HF, "train.log_every"),
    Synonym("log_interval", MEGATRON, "train.log_every"),
    Synonym("report_to", _ALL_HF, "output.tensorboard", "true or false"),
    Synonym("tensorboard_dir", MEGATRON, "output.tensorboard", "true or false; it lies in output.dir"),
    Synonym("resume_from_checkpoint", _ALL_HF, "train.resume", "never, auto or the folder of a checkpoint"),
)
ROW_KEYS = (
    Synonym(
        "conversations",
        _CHATS,
        "messages",
        "its messages have 'role' and 'content' in place of 'from' and 'value', and the roles system, user and "
        "assistant in place of human and gpt",
    ),
    Synonym("conversation", _CHATS, "messages"),
    Synonym("dialogue", _CHATS, "messages"),
    Synonym("instruction", _ALPACA, "prompt", "with the text of 'input' in it"),
    Synonym("question", "QA data", "prompt"),
    Synonym("query", "QA data", "prompt"),
    Synonym("output", _ALPACA, "completion"),
    Synonym("response", "QA data", "completion"),
    Synonym("answer", "QA data", "completion"),
    Synonym("target", "QA data", "completion"),
    Synonym(
        "text",
        "plain text",
        "completion",
        "with an empty 'prompt'; every token is trained that follows another token, such as BOS",
    ),
    Synonym("chosen", _PREFERENCES, None, _PREFERENCE),
    Synonym("rejected", _PREFERENCES, None, _PREFERENCE),
)
MESSAGE_KEYS = (
    Synonym("from", _CHATS, "role", "system, user or assistant"),
    Synonym("value", _CHATS, "content"),
)

_NO_LOW_RANK = "not supported: the low-rank methods are LoRA, rsLoRA and DoRA"
# Names that others give to methods → what to write here.
METHODS = {
    "dora": "write method=lora lora.dora=true",
    "rslora": "write method=lora lora.rslora=true",
    "qlora": "not supported: the base is held in bf16 or fp32 and never quantised; write method=lora",
    "lora+": "not supported: A and B have one learning rate; write method=lora",
    **dict.fromkeys(("adalora", "ia3", "loha", "lokr", "oft", "boft", "vera", "pissa", "galore"), _NO_LOW_RANK),
    **dict.fromkeys(("adapter", "adapters", "bottleneck", "houlsby"), "write method=adapter_h or method=adapter_l"),
    **dict.fromkeys(("prefix_tuning", "p_tuning_v2"), "write method=prefix"),
    **dict.fromkeys(("prompt_tuning", "p_tuning"), "write method=prompt"),
    **dict.fromkeys(("sft", "finetuning", "full_finetuning"), "write method=full, or method=lora"),
    "freeze": "not supported: no layers are frozen one by one; write method=full, or method=lora",
    **dict.fromkeys(("dpo", "kto", "orpo", "ppo", "grpo"), f"not supported: {_PREFERENCE}"),
}

# Roles of ShareGPT's messages → ours.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def _by_name(synonyms: tuple[Synonym, ...]) -> Mapping[str, Synonym]:
    return {synonym.theirs: synonym for synonym in synonyms}


_OF_CONFIG, _OF_ROWS = _by_name(CONFIG_KEYS), _by_name(ROW_KEYS)


def of_config(name: str) -> Synonym | None:
    """Return the entry of another trainer's key, given without its section. Case and dashes do not matter."""
    return _OF_CONFIG.get(name.replace("-", "_").lower())


def of_method(name: str) -> str | None:
    """Return what to write for a name that others give to a method. Case and dashes do not matter."""
    return METHODS.get(name.replace("-", "_").lower())


def of_row(key: str) -> Synonym | None:
    """Return the entry of a key of other formats' data rows."""
    return _OF_ROWS.get(key)


def of_message(ours: str, keys: Collection[str]) -> list[str]:
    """Return those of a message's `keys` that other formats use in place of `ours`."""
    return [synonym.theirs for synonym in MESSAGE_KEYS if synonym.ours == ours and synonym.theirs in keys]


def to_markdown(synonyms: Sequence[Synonym]) -> str:
    """Return entries as a table, for the documentation."""
    lines = ["| their key | of | ours | difference |", "|---|---|---|---|"]
    for each in synonyms:
        ours = "–" if each.ours is None else f"`{each.ours}`"
        lines.append(f"| `{each.theirs}` | {each.trainers} | {ours} | {each.note} |")
    return "\n".join(lines) + "\n"
