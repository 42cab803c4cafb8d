"""Short training runs of every method on tiny models, and plain PyTorch references of them, as plain numbers.

The runs take place on forked ranks and use the production code (choose, load_model, ZeroOptimiser). Only the data and
the parameter values that replace the method's own start are made here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from tests.dist import ranks
from tests.dist.tiny_runs import MAX_LENGTH, Setting, microbatches, samples
from tests.tiny_models import VOCAB

VIRTUAL, BOTTLENECK, WIDTH = 5, 12, 10
# Name here → (method, section of its options, options).
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "full": ("full", "", {}),
    "adapter_h": ("adapter_h", "adapter", {"bottleneck": BOTTLENECK, "placement": "sharded"}),
    "adapter_h_replicated": ("adapter_h", "adapter", {"bottleneck": BOTTLENECK, "placement": "replicated"}),
    "adapter_l": ("adapter_l", "adapter", {"bottleneck": BOTTLENECK, "placement": "sharded"}),
    "adapter_l_replicated": ("adapter_l", "adapter", {"bottleneck": BOTTLENECK, "placement": "replicated"}),
    "prefix": ("prefix", "prefix", {"length": VIRTUAL, "width": None}),
    "prefix_mlp": ("prefix", "prefix", {"length": VIRTUAL, "width": WIDTH}),
    "prompt": ("prompt", "prompt", {"length": VIRTUAL}),
    "dora": ("lora", "lora", {"dora": True, "rank": 4, "alpha": 8.0}),
    "dora_dropout": ("lora", "lora", {"dora": True, "rank": 4, "alpha": 8.0, "dropout": 0.1}),
}
CLIP, DECAY, BETAS, EPS = 0.5, 0.01, (0.9, 0.999), 1e-3
# Standard deviation of the drawn parameter values, by the last part of the stored name.
_SPREADS = {
    "norm.weight": 0.2,
    "down.weight": 0.2,
    "up.weight": 0.2,
    "prefix": 0.7,
    "prefix.embedding": 1.0,
    "hidden.weight": 0.15,
    "output.weight": 0.25,
    "prompt.embeddings": 0.15,
    "lora_magnitude_vector": 0.05,
}
# Parameters that are drawn around 1, not around 0.
_AROUND_1 = ("norm.weight", "lora_magnitude_vector")


@dataclass(frozen=True)
class MethodSetting(Setting):
    """name: a key of METHODS. use_drawn_values: start from the tensors of `drawn_values`, not from the method's.

    logit_bytes: largest block of logits, 0 for the usual one.
    """

    name: str = "full"
    use_drawn_values: bool = True
    logit_bytes: int = 0


@dataclass
class Built:
    """A setting as `build` assembles it on this rank."""

    model: Any
    method: Any
    theta: Any
    topology: Any


def drawn_values(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return random whole tensors by their stored names, the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    values = {}
    for name, shape in shapes.items():
        spread = next((value for end, value in _SPREADS.items() if name == end or name.endswith(f".{end}")), 0.1)
        values[name] = torch.randn(shape, generator=generator) * spread + name.endswith(_AROUND_1)
    return values


def run_config(folder: str, name: str) -> Any:
    """The configuration of a run of this method."""
    from lowrank_dist.config import Config

    method, section, options = METHODS[name]
    return Config.model_validate(
        {
            "model": {"path": folder},
            "method": method,
            **({section: options} if section else {}),
            "data": {"train": "none.jsonl", "max_length": MAX_LENGTH},
            "output": {"dir": "none"},
        }
    )


def build(setting: MethodSetting) -> Built:
    from lowrank_dist.arch.config_json import read_architecture
    from lowrank_dist.engine.run_method import build_method
    from lowrank_dist.model.load import load_model

    topology = ranks.topology(setting.tensor, setting.sequence)
    model = load_model(
        Path(setting.folder),
        read_architecture(Path(setting.folder)),  # No length limit: the window is tested by decoding beyond it.
        topology,
        device=ranks.device(),
        dtype=setting.dtype,
        vocab_multiple=setting.vocab_multiple,
        broadcast=False,
    )
    method = build_method(run_config(setting.folder, setting.name), model.architecture)
    model.set_recompute(setting.recompute)
    theta = method.attach(model, topology, resumed=False)
    if setting.use_drawn_values and setting.name != "full":
        values = drawn_values(theta.all_shapes())
        if setting.broken == "heads":
            values["prefix"] = values["prefix"].flip(3)
        theta.set_from_whole(values, topology.coordinates)
    if setting.broken == "qk_norm":
        for name, parameter in model.named_parameters():
            if any(norm in name for norm in ("q_layernorm", "k_layernorm", "heads_norm.key")):
                parameter.tp_partial_grad = False
    if setting.broken == "norms":
        from lowrank_dist.parallel import decomposed

        with mock.patch.object(decomposed, "all_reduce", lambda *_: mock.Mock()):
            theta.refresh()
    if setting.broken == "positions":
        model.prefix.length = 0
    return Built(model, method, theta, topology)


def whole(built: Built, select: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """Return whole stored tensors, gathered from every rank's parameters as copies. Collective."""
    from lowrank_dist.parallel.theta import copy_to_whole

    theta, topology = built.theta, built.topology
    found = {}
    for trained in theta.trained:
        parameter = trained.parameter
        values = {name: torch.zeros(shape) for name, shape in trained.shapes.items()}
        copy_to_whole(trained.shard_at(topology.coordinates).slices, select(parameter).detach().float().cpu(), values)
        for name, value in values.items():
            if parameter.tensor_model_parallel:
                value = value.to(ranks.device())
                dist.all_reduce(value, group=topology.tp_group)
            found[name] = value.cpu()
    return found


def measure(settings: Sequence[MethodSetting]) -> list[dict[str, Any]]:
    """On one rank, by setting: return loss and whole gradients, then losses, norms and whole weights of training."""
    from lowrank_dist.parallel import vocab

    found = []
    for setting in settings:
        built = build(setting)
        with mock.patch.object(vocab, "LOGIT_BLOCK_BYTES", setting.logit_bytes or vocab.LOGIT_BLOCK_BYTES):
            numbers = forward_backward(built, setting)
            found.append(numbers | train(built, setting) if setting.steps else numbers)
    return found


def forward_backward(built: Built, setting: MethodSetting) -> dict[str, Any]:
    """Return the loss and every whole gradient, computed without DeepSpeed."""
    topology = built.topology
    batches, targets = _batches(built, setting)
    total = torch.zeros((), device=ranks.device())
    for batch in batches:
        loss = _loss(built, batch)
        (loss / targets).backward()
        total += loss.detach()
    for parameter in built.theta.parameters:
        dist.all_reduce(parameter.grad, group=topology.dp_group)
        if parameter.tp_partial_grad and setting.broken != "deferred":
            dist.all_reduce(parameter.grad, group=topology.tp_group)
    dist.all_reduce(total, group=topology.dp_group)
    gradients = whole(built, lambda parameter: parameter.grad)
    for parameter in built.theta.parameters:
        parameter.grad = None
    return {"loss": total.item() / targets, **_named("gradient", gradients)}


def train(built: Built, setting: MethodSetting) -> dict[str, Any]:
    """Return losses, gradient norms and whole weights of AdamW steps with clipping, through ZeRO."""
    from lowrank_dist.engine.zero import OptimiserRules, ZeroOptimiser

    rules = OptimiserRules(setting.zero_stage, CLIP, None, DECAY, BETAS, EPS)
    optimiser = ZeroOptimiser(built.theta.parameters, built.topology, rules)
    if setting.broken == "deferred":
        optimiser._sum_partial = lambda: None
    batches, targets = _batches(built, setting)
    losses, norms = [], []
    for _ in range(setting.steps):
        total = torch.zeros((), device=ranks.device())
        for index, batch in enumerate(batches):
            total += optimiser.accumulate(
                lambda batch=batch: _loss(built, batch), 1 / targets, index + 1 == len(batches)
            )
        dist.all_reduce(total, group=built.topology.dp_group)
        losses.append(total.item() / targets)
        norms.append(optimiser.step(setting.lr))
        if setting.broken != "stale":
            built.theta.refresh()
    return {"losses": losses, "norms": norms, **_named("weight", whole(built, lambda parameter: parameter))}


def _batches(built: Built, setting: MethodSetting) -> tuple[list[Any], int]:
    topology, virtual_token_ids = built.topology, built.method.virtual_token_ids
    pad = topology.tp_size if topology.sequence_parallel else 1
    return microbatches(setting, topology.dp_rank, topology.dp_size, pad, virtual_token_ids)


def _loss(built: Built, batch: Any) -> Tensor:
    built.theta.masks.set(0, batch.dropout_rows)
    return built.model.loss(batch.input_ids, batch.position_ids, batch.target_index, batch.target_ids, batch.segments)


def _named(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {f"{kind} {name}": tensor.numpy() for name, tensor in tensors.items()}


def write_and_score(setting: MethodSetting, folder: str) -> np.ndarray:
    """On one rank: return the logits [2, 16, V] of fixed tokens; rank 0 also writes the method's adapter folder."""
    from lowrank_dist.formats.provenance import Provenance, fingerprint

    built = build(setting)
    tensors = whole(built, lambda parameter: parameter)
    if dist.get_rank() == 0:
        provenance = Provenance(fingerprint(Path(setting.folder)), setting.folder, {})
        files = built.method.files(Path(folder), provenance, trained=True)
        for name, tensor in tensors.items():
            files.put(name, tensor)
        files.finish()
    return logits_of(built.model.eval(), fixed_tokens()).cpu().numpy()


def fixed_tokens() -> Tensor:
    """Return fixed token ids [2, 16], the same for every setting."""
    return torch.randint(5, 100, (2, 16), generator=torch.Generator().manual_seed(5))


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Return the logits [b, s, V] of the given tokens, which follow the method's own positions, if any."""
    count = len(model.virtual_token_ids)
    virtual_token_ids = torch.tensor(model.virtual_token_ids, dtype=torch.int64).expand(ids.size(0), count)
    every = torch.cat((virtual_token_ids, ids), dim=1)
    # Pad on the right to a length that the ranks divide; no earlier token attends to the padding.
    multiple = model.topology.tp_size if model.topology.sequence_parallel else 1
    every = F.pad(every, (0, -every.size(1) % multiple)).to(ranks.device())
    positions = torch.arange(every.size(1), device=every.device).expand(every.shape)
    return model.logits(every, positions)[:, count : count + ids.size(1)]


def reference(found: Any, steps: int = 3, virtual: int = 0) -> dict[str, Any]:
    """Return what `measure` returns, by `verify`'s training of a reference (a `Reference`, from the same values).

    virtual: number of virtual tokens before every sample.
    """
    from lowrank_dist.data.masking import Sample
    from lowrank_dist.engine.zero import OptimiserRules
    from lowrank_dist.verify.reference import run_reference

    front = np.arange(VOCAB, VOCAB + virtual)
    batch = [
        Sample(
            np.concatenate((front, tokens.numpy())).astype(np.int32),
            np.concatenate((np.zeros(virtual, bool), target.numpy())),
            1,
        )
        for tokens, target in samples()
    ]
    count = max(steps, 1)
    rules = OptimiserRules(1, CLIP, None, DECAY, BETAS, EPS)
    record = run_reference(found, [batch] * count, MethodSetting.lr, rules)
    made = {"loss": record.losses[0], **_named("gradient", record.gradients[0])}
    if not steps:
        return made
    weights = {name: leaf.detach() for name, leaf in found.parameters.items()}
    return {**made, "losses": record.losses, "norms": record.norms, **_named("weight", weights)}


def reference_of(folder: str, name: str, start: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Return the `Reference` of a method on one of the tiny models. start: a `Start`."""
    from lowrank_dist.methods.method import Setting as Given
    from lowrank_dist.methods.registry import method_package

    config = run_config(folder, name)
    builder = method_package(config.method).reference
    given = Given(config.method, Path(folder), 0, MAX_LENGTH, "off")
    return builder.build(config.own_section, given, start, dtype, torch.device("cpu"))


def twins_of(settings: Iterable[MethodSetting], tensor: int, sequence: bool) -> list[MethodSetting]:
    return [replace(setting, tensor=tensor, sequence=sequence) for setting in settings]


PROMPT_LENGTHS, NEW = (3, 11, 7, 1, 14, 9), 12
STOPS = tuple(range(30, 38))  # random models write one about every thirteenth token


def prompt_rows(lengths: Sequence[int] = PROMPT_LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(6, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def decode(
    settings: Sequence[MethodSetting], batch: int, lengths: Sequence[int] = PROMPT_LENGTHS
) -> list[dict[str, Any]]:
    """On one rank: return greedy completions, and the tokens that whole forward passes choose at the same positions."""
    from lowrank_dist.data.tokenizer import load_tokenizer
    from lowrank_dist.generate.decode import generate
    from lowrank_dist.generate.prompts import Prompt
    from lowrank_dist.generate.sampling import SamplingParams

    found = []
    for setting in settings:
        built = build(setting)
        model, rows = built.model.eval(), prompt_rows(lengths)
        prompts = [Prompt(f"row {i}", "", tuple(row), frozenset(STOPS)) for i, row in enumerate(rows)]
        rules = SamplingParams(max_new_tokens=NEW, batch=batch)
        if setting.broken == "cache":
            model.new_cache = _without_prefix(model)
        made = generate(model, load_tokenizer(Path(setting.folder)), prompts, rules, built.topology)
        written = [list(generation.tokens) for generation in made]
        found.append({"written": written, "whole": _rewritten(model, rows, written)})
    return found


def _without_prefix(model: Any) -> Callable[..., Any]:
    make, prefix = model.new_cache, model.prefix

    def new_cache(*sizes: Any) -> Any:
        model.prefix = None
        cache = make(*sizes)
        model.prefix = prefix
        return cache

    return new_cache


def _rewritten(model: Any, rows: list[list[int]], written: list[list[int]]) -> list[list[int]]:
    """For every token of the completions, return the most likely one after everything before it."""
    every = [row + tokens for row, tokens in zip(rows, written, strict=True)]
    longest = max(map(len, every))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in every])
    with model.without_sequence_parallelism():  # the longest row leaves no position for padding
        best = logits_of(model, ids).argmax(dim=-1).tolist()
    return [
        likeliest[len(row) - 1 : len(row) + len(tokens) - 1]
        for likeliest, row, tokens in zip(best, rows, written, strict=True)
    ]
