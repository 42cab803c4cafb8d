"""Names that other trainers give to keys of the config and of data rows, with ours: one table.

Errors on unknown keys use it to say what was meant, and docs/reference/other-trainers.md is made from it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

PEFT, HF, FACTORY, AXOLOTL, MEGATRON = "PEFT", "HF Trainer", "LLaMA-Factory", "Axolotl", "Megatron"
_ALL_HF = f"{HF}, {FACTORY}, {AXOLOTL}"
_CHATS, _ALPACA, _PREFERENCES = "ShareGPT", "Alpaca", "DPO data"


@dataclass(frozen=True)
class Synonym:
    """A key of other trainers. trainers: those that have it. ours: the key here, or None where there is none.

    note: the difference in meaning, or why there is none; empty where both mean the same.
    """

    theirs: str
    trainers: str
    ours: str | None
    note: str = ""

    @property
    def hint(self) -> str:
        """The end of an error on the key: the one that was meant, and the difference."""
        if self.ours is None:
            return f"not supported: {self.note}; "
        return f"did you mean {self.ours}? " + (f"({self.note}) " if self.note else "")


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
    Synonym("load_in_4bit", AXOLOTL, None, "the base is held in bf16 or fp32"),
    Synonym("load_in_8bit", AXOLOTL, None, "the base is held in bf16 or fp32"),
    Synonym("quantization_bit", FACTORY, None, "the base is held in bf16 or fp32"),
    Synonym("trust_remote_code", _ALL_HF, None, "code that comes with a model is never run"),
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
    Synonym("modules_to_save", PEFT, None, "embeddings, norms and lm_head are frozen beside an adapter"),
    Synonym("num_virtual_tokens", PEFT, "prefix.length", "for method=prompt it is prompt.length"),
    Synonym("prefix_projection", PEFT, "prefix.width", "the width of the MLP, or null for none"),
    # Ranks.
    Synonym("tensor_model_parallel_size", MEGATRON, "parallel.tensor"),
    Synonym("tensor_parallel_size", HF, "parallel.tensor"),
    Synonym("sequence_parallel", MEGATRON, "parallel.sequence", "on by default when parallel.tensor is above 1"),
    Synonym("pipeline_model_parallel_size", MEGATRON, None, "ranks are tensor and data parallel only"),
    Synonym("context_parallel_size", MEGATRON, None, "ranks are tensor and data parallel only"),
    # Batches.
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
    Synonym("loraplus_lr_ratio", FACTORY, None, "A and B have one learning rate"),
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
    Synonym("template", FACTORY, "data.tokenizer", "the chat template is the tokenizer's own"),
    Synonym("chat_template", AXOLOTL, "data.tokenizer", "the chat template is the tokenizer's own"),
    Synonym("train_on_inputs", AXOLOTL, None, "the loss is that of completions and assistant messages"),
    Synonym("train_on_prompt", FACTORY, None, "the loss is that of completions and assistant messages"),
    # What is written, and when.
    Synonym("output_dir", _ALL_HF, "output.dir"),
    Synonym("save", MEGATRON, "output.dir"),
    Synonym("overwrite_output_dir", f"{HF}, {FACTORY}", "output.overwrite", "it removes the run that lies there"),
    Synonym("save_steps", _ALL_HF, "output.save_every"),
    Synonym("save_interval", MEGATRON, "output.save_every"),
    Synonym("save_total_limit", _ALL_HF, "output.keep_last"),
    Synonym("eval_steps", _ALL_HF, "eval.every"),
    Synonym("eval_interval", MEGATRON, "eval.every"),
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
        "with an empty 'prompt'; every token is trained that another precedes, as BOS does",
    ),
    Synonym("chosen", _PREFERENCES, None, "there is no preference training"),
    Synonym("rejected", _PREFERENCES, None, "there is no preference training"),
)
MESSAGE_KEYS = (
    Synonym("from", _CHATS, "role", "system, user or assistant"),
    Synonym("value", _CHATS, "content"),
)

# Roles of ShareGPT's messages → ours.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def _by_name(synonyms: tuple[Synonym, ...]) -> Mapping[str, Synonym]:
    return {synonym.theirs: synonym for synonym in synonyms}


_OF_CONFIG, _OF_ROWS = _by_name(CONFIG_KEYS), _by_name(ROW_KEYS)


def of_config(name: str) -> Synonym | None:
    """Return the entry of another trainer's key, given without its section. Case and dashes do not matter."""
    return _OF_CONFIG.get(name.replace("-", "_").lower())


def of_row(key: str) -> Synonym | None:
    """Return the entry of a key of other formats' data rows."""
    return _OF_ROWS.get(key)


def of_message(ours: str, keys: Collection[str]) -> list[str]:
    """Return the keys among a message's that other formats have in place of `ours`."""
    return [synonym.theirs for synonym in MESSAGE_KEYS if synonym.ours == ours and synonym.theirs in keys]


def to_markdown(synonyms: Sequence[Synonym]) -> str:
    """Return entries as a table, for the documentation."""
    lines = ["| their key | of | ours | difference |", "|---|---|---|---|"]
    for each in synonyms:
        ours = "–" if each.ours is None else f"`{each.ours}`"
        lines.append(f"| `{each.theirs}` | {each.trainers} | {ours} | {each.note} |")
    return "\n".join(lines) + "\n"
