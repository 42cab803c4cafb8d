"""What a run can be told: frozen, strict models, one a section. A field's description is the remedy in an error.

Imports nothing of ours and no torch, so that a config can be checked anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)

from lowrank_dist.config.scalars import Dumper


def _path(value: object) -> Path:
    # Strict mode takes no text for a path, and YAML has nothing else.
    if isinstance(value, Path) or isinstance(value, str) and value:
        return Path(value)
    raise ValueError("a path is text that is not empty (a number as a name needs quotes)")


def _regular_expression(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return value


YamlPath: TypeAlias = Annotated[Path, BeforeValidator(_path)]
Pattern: TypeAlias = Annotated[str, Field(min_length=1), AfterValidator(_regular_expression)]
Rank: TypeAlias = Annotated[int, Field(ge=1, le=1024)]
Alpha: TypeAlias = Annotated[float, Field(gt=0)]
# Told apart by hand, so that an error speaks of the branch that was meant.
Targets: TypeAlias = Annotated[
    Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1), Tag("names")]
    | Annotated[Pattern, Tag("pattern")],
    Discriminator(lambda value: "names" if isinstance(value, list) else "pattern"),
]


Resume: TypeAlias = Annotated[
    Annotated[Literal["never", "auto"], Tag("word")] | Annotated[YamlPath, Tag("path")],
    Discriminator(lambda value: "word" if value in ("never", "auto") else "path"),
]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class ModelConfig(Section):
    path: YamlPath = Field(description="folder of a Hugging Face checkpoint (config.json and safetensors)")
    dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto (the checkpoint's), fp32 or bf16")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")
    load: Literal["each", "broadcast"] = Field(
        "each", description="each (every data-parallel replica reads its slices) or broadcast (replica 0 reads for all)"
    )
    vocab_multiple: int = Field(
        128,
        ge=1,
        description="integer of at least 1: embedding rows are padded to a multiple of it times parallel.tensor",
    )


class LoraConfig(Section):
    rank: Rank = Field(8, description="rank r of a factor pair, an integer from 1 to 1024")
    alpha: Alpha = Field(16.0, description="number above 0: the update is scaled by alpha/rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability of at least 0 and below 1")
    targets: Targets = Field(
        "all-linear", description="list of module names ([q_proj, v_proj]), all-linear, or one regular expression"
    )
    rslora: bool = Field(False, description="true (scale by alpha/sqrt(rank)) or false")
    rank_pattern: dict[Pattern, Rank] = Field(
        {}, description="mapping from module path or regular expression to a rank from 1 to 1024"
    )
    alpha_pattern: dict[Pattern, Alpha] = Field(
        {}, description="mapping from module path or regular expression to an alpha above 0"
    )
    init_from: YamlPath | None = Field(
        None, description="folder of a PEFT LoRA adapter to start from, which says all of lora but dropout, or null"
    )


class AdapterConfig(Section):
    bottleneck: int = Field(64, ge=1, le=65536, description="width m of a bottleneck, an integer of at least 1")
    placement: Literal["sharded", "replicated"] = Field(
        "sharded",
        description="sharded (column then row over parallel.tensor, with collectives of its own) or replicated (every "
        "rank stores and computes all of it)",
    )


class PrefixConfig(Section):
    length: int = Field(16, ge=1, le=65536, description="virtual positions l, an integer of at least 1")
    width: int | None = Field(
        512, ge=1, le=65536, description="width of the MLP that makes keys and values in training, or null for none"
    )


class PromptConfig(Section):
    length: int = Field(16, ge=1, le=65536, description="virtual positions l, an integer of at least 1")
    init: Literal["vocabulary", "random"] = Field(
        "vocabulary", description="vocabulary (the embeddings of tokens drawn by train.seed) or random"
    )


class ParallelConfig(Section):
    tensor: int = Field(1, ge=1, description="tensor-parallel size, an integer of at least 1")
    data: int | None = Field(
        None, ge=1, description="data-parallel size of at least 1, or null for all remaining ranks"
    )
    sequence: bool | None = Field(None, description="true, false, or null for on when parallel.tensor is above 1")
    across_nodes: bool = Field(
        False,
        description="true (a tensor-parallel group may lie on several nodes, where every layer waits for the network) "
        "or false",
    )


class DataConfig(Section):
    train: YamlPath = Field(description="JSONL file to train on")
    eval: YamlPath | None = Field(
        None, description="JSONL file to evaluate on, or null; of a list of completions the loss is of the first"
    )
    max_length: int = Field(1024, ge=2, description="longest sample in tokens, an integer of at least 2")
    packing: bool = Field(False, description="true (several samples a row) or false")
    tokenizer: YamlPath | None = Field(None, description="folder or file of the tokenizer, or null for model.path")


class EngineConfig(Section):
    zero_stage: Literal[1, 2] = Field(1, description="1 or 2 (0 trains wrongly and 3 gathers the base every step)")
    clip: float | None = Field(
        1.0, gt=0, description="largest gradient norm, a number above 0, or null for no clipping"
    )
    recompute: Literal["none", "full"] = Field(
        "none", description="none, or full (recompute every layer's activations)"
    )
    timeout_seconds: int = Field(
        600, ge=1, description="seconds after which a collective that hangs, or a rank that stands still, is an error"
    )
    straggler_factor: float | None = Field(
        1.5, gt=1, description="a rank that needs this many times the median's time is named, above 1, or null for none"
    )
    reduce_bucket: int | None = Field(
        None, ge=1, description="elements of the reduction bucket, or null for the number of trainable parameters"
    )
    kernels: Literal["auto", "compiled", "plain"] = Field(
        "auto",
        description="auto (compiled operators and apex where they are there), compiled (the same, but an error where "
        "the operators are not built) or plain (PyTorch's alone)",
    )
    lanes: Literal["auto", "on", "off"] = Field(
        "auto",
        description="on (under sequence parallelism a factor is kept beside its frozen weight, so that one GEMM "
        "computes both products), off, or auto (on where that was measured to be faster)",
    )


class TrainConfig(Section):
    steps: int | None = Field(None, ge=1, description="optimizer steps of at least 1; or set train.epochs instead")
    epochs: float | None = Field(None, gt=0, description="passes over the data, above 0; or set train.steps instead")
    global_batch: int = Field(8, ge=1, description="samples in an optimizer step over all ranks, at least 1")
    micro_batch: int = Field(1, ge=1, description="rows per rank and microbatch, a divisor of train.global_batch")
    lr: float = Field(2e-4, gt=0, description="peak learning rate above 0")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="cosine, linear or constant")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warmup, at least 0")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="last learning rate over the peak, from 0 to 1")
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="AdamW's decoupled weight decay, at least 0; of all that is trained, norms and biases too",
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay rate, at least 0 and below 1")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second decay rate, at least 0 and below 1")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon above 0")
    seed: int = Field(42, ge=0, lt=2**32, description="integer of at least 0 and below 2^32")
    nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="what a loss or gradient that is not finite does: stop the run, or skip the step"
    )
    max_skips: int = Field(
        10, ge=1, description="steps skipped in a row after which train.nonfinite=skip stops the run, at least 1"
    )
    log_every: int = Field(1, ge=1, description="steps between log lines, at least 1")
    ignore_plan: bool = Field(
        False, description="true (start also where the plan says that memory does not suffice) or false"
    )
    resume: Resume = Field(
        "never",
        description="never, auto (from the newest complete checkpoint in output.dir, where there is one) or the folder "
        "of a checkpoint (./auto for one of such a name)",
    )
    resume_changes: list[str] = Field(
        [],
        description="list of the keys (section.key) that may differ from the checkpoint's, such as [train.lr]",
    )

    @field_validator("epochs")
    @classmethod
    def _one_length(cls, epochs: float | None, info: ValidationInfo) -> float | None:
        steps = info.data.get("steps")
        if steps is not None and epochs is not None:
            raise ValueError(f"train.steps ({steps}) and train.epochs both say how long to train")
        return 1.0 if epochs is None and steps is None else epochs

    @field_validator("micro_batch")
    @classmethod
    def _divides_the_batch(cls, micro_batch: int, info: ValidationInfo) -> int:
        if "global_batch" in info.data and info.data["global_batch"] % micro_batch:
            raise ValueError(f"train.global_batch ({info.data['global_batch']}) is not a multiple of it")
        return micro_batch


class GenerateConfig(Section):
    """What is generated at an evaluation, always greedily: equal models write equal texts."""

    metrics: list[Literal["exact_match", "bleu", "rouge_l"]] = Field(
        ["exact_match"], min_length=1, description="list of exact_match, bleu and rouge_l"
    )
    max_new_tokens: int = Field(
        128, ge=1, description="most tokens of a completion, an integer of at least 1; how many met it is recorded"
    )
    batch: int = Field(8, ge=1, description="prompts decoded together on a rank, at least 1")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="list of texts that end a completion, beside the end-of-text and end-of-turn tokens"
    )
    samples: int | None = Field(None, ge=1, description="samples of data.eval to use, its first, or null for all")


class EvalConfig(Section):
    every: int | None = Field(
        None, ge=1, description="steps between evaluations, or null for only at the start and end"
    )
    micro_batch: int | None = Field(
        None, ge=1, description="rows per rank and microbatch, or null for train.micro_batch"
    )
    at_start: bool = Field(True, description="true or false")
    generate: GenerateConfig | None = Field(
        None,
        description="mapping of what to generate for data.eval's prompts at every evaluation ({} for its defaults), or "
        "null for the loss alone",
    )
    best: Literal["loss", "exact_match", "bleu", "rouge_l"] = Field(
        "loss",
        description="what checkpoints/best and eval.patience go by: loss (the lowest), or one of eval.generate.metrics "
        "(the highest); of equals the earlier step",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="evaluations in a row without a better value of eval.best after which the run ends early, at least "
        "1, or null for never",
    )

    @field_validator("best")
    @classmethod
    def _is_measured(cls, best: str, info: ValidationInfo) -> str:
        if best != "loss" and "generate" in info.data:
            generate = info.data["generate"]
            if generate is None:
                raise ValueError("nothing is generated: eval.generate is null")
            if best not in generate.metrics:
                raise ValueError(f"eval.generate.metrics has only {', '.join(generate.metrics)}")
        return best

    @field_validator("patience")
    @classmethod
    def _sees_evaluations(cls, patience: int | None, info: ValidationInfo) -> int | None:
        if patience is not None and info.data.get("every", 1) is None:
            raise ValueError("eval.every is null: there is no evaluation after which a run could end early")
        return patience


class OutputConfig(Section):
    dir: YamlPath = Field(description="folder of the run; it holds none yet, or the one that train.resume goes on with")
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints, or null for only at the end")
    keep_last: int | None = Field(3, ge=1, description="newest checkpoints to keep, at least 1, or null for all")
    keep_best: int = Field(1, ge=0, description="checkpoints, the best by eval.best, to keep beside them, at least 0")
    tensorboard: bool = Field(True, description="true or false")
    plot: bool = Field(True, description="true or false")
    probe: int = Field(
        0, ge=0, description="rows of eval data whose logits are kept in probe.safetensors to prove a merge, at least 0"
    )


# The section that belongs to each method alone; full has none.
SECTION_OF = {"lora": "lora", "adapter_h": "adapter", "adapter_l": "adapter", "prefix": "prefix", "prompt": "prompt"}


class UnreadKeys(ValueError):
    """`keys` of a section that the method does not read. Its text is what is wrong with each, and the remedy."""

    def __init__(self, keys: Sequence[str], section: str, method: str) -> None:
        self.keys = tuple(keys)
        readers = " or ".join(name for name, read in SECTION_OF.items() if read == section)
        super().__init__(f"not read by method {method} — remove it, or set method to {readers}")


class Config(Section):
    """A whole run. Two configs are equal when the runs they describe are."""

    model: ModelConfig
    method: Literal["lora", "full", "adapter_h", "adapter_l", "prefix", "prompt"] = Field(
        "lora",
        description="lora, full (every weight), adapter_h, adapter_l (adapter layers of Houlsby and of Lin), prefix or "
        "prompt",
    )
    lora: LoraConfig = LoraConfig()
    adapter: AdapterConfig = AdapterConfig()
    prefix: PrefixConfig = PrefixConfig()
    prompt: PromptConfig = PromptConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    engine: EngineConfig = EngineConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    output: OutputConfig

    @field_validator("lora", "adapter", "prefix", "prompt")
    @classmethod
    def _of_the_method(cls, section: Section, info: ValidationInfo) -> Section:
        method = info.data.get("method")
        if method is not None and SECTION_OF.get(method) != info.field_name and section.model_fields_set:
            raise UnreadKeys(sorted(section.model_fields_set), info.field_name, method)
        return section

    @field_validator("eval")
    @classmethod
    def _has_samples(cls, section: EvalConfig, info: ValidationInfo) -> EvalConfig:
        asked = [key for key in ("generate", "patience") if getattr(section, key) is not None]
        if asked and "data" in info.data and info.data["data"].eval is None:
            raise ValueError(f"eval.{asked[0]} is given, but data.eval is null — name a JSONL file in data.eval")
        return section

    def read_keys(self) -> dict[str, Any]:
        """Every key that the run reads, in its section, as JSON values: those of other methods are left out."""
        unread = set(SECTION_OF.values()) - {SECTION_OF.get(self.method)}
        return self.model_dump(mode="json", exclude=unread)

    def to_yaml(self) -> str:
        """Every key that the run reads with the value it has, as `load_config` reads it back to an equal config."""
        return yaml.dump(self.read_keys(), Dumper=Dumper, sort_keys=False)
