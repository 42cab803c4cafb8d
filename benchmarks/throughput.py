"""Tokens per second of our training step against PEFT in a plain PyTorch loop, as a ratio within one process.

    python benchmarks/throughput.py [--pairs 15] [--threads 2] [--settings fp32:0.5 ...]

SmolLM2-135M (build/quickstart/base, made where it is missing), TP 1, rank 8 on all linears, dropout 0, no recompute,
AdamW, gradient norm clipped at 1. Both sides get the same token tensors: --batch rows of --length tokens, no padding,
the first part of each row a prompt. A pair is one step of each side, in alternating order; a setting's figure is the
median over its pairs of (PEFT's seconds / our seconds). The base is fp32 or bf16, the trained factors are fp32 on both
sides. Before timing, both must give the same loss (B is zero) and train the same number of parameters. The last line
is `ratio_vs_peft=…`, fp32 at prompt share 0.5.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from record import machine, write_result
from rich.console import Console
from rich.table import Table
from spawn import free_port
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_dist.arch.placement import LoraRules, place_factors
from lowrank_dist.backend.libraries import quiet_libraries
from lowrank_dist.backend.select import init_process_group, select_backend, shutdown
from lowrank_dist.data.batches import Microbatch
from lowrank_dist.engine.zero import OptimiserRules, ZeroOptimiser
from lowrank_dist.methods.lora.factors import inject
from lowrank_dist.model.load import check_model, load_model
from lowrank_dist.ops import linear
from lowrank_dist.parallel.masks import MaskSource
from lowrank_dist.parallel.topology import Topology

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "build" / "quickstart"
RANK, ALPHA, LR, CLIP = 8, 16, 2e-4, 1.0
SHARES = (0.0, 0.5, 0.75)
HEADLINE = ("fp32", 0.5)
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


@dataclass(frozen=True)
class Batch:
    """The same tokens for both sides: labels [b, s] with -100 on the prompt, and our form of the same."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    microbatch: Microbatch


@dataclass(frozen=True)
class Side:
    """A trainer under test: `step` does forward, backward and update and returns the mean loss per target."""

    step: Callable[[Batch], float]
    trained: int


def make_batch(tokens: torch.Tensor, share: float) -> Batch:
    """Return tokens [b, s]: the first share * s of a row are prompt, each later token but the row's first a target."""
    b, s = tokens.shape
    first = max(round(share * s), 1)
    labels = tokens.clone()
    labels[:, :first] = -100
    positions = torch.arange(s).expand(b, s).contiguous()
    microbatch = Microbatch(
        input_ids=tokens,
        position_ids=positions,
        target_index=torch.arange((first - 1) * b, (s - 1) * b),
        target_ids=tokens.t()[first:].reshape(-1),
        dropout_rows=(torch.arange(b)[None] * s + positions.t()).contiguous(),
        segments=None,
    )
    return Batch(tokens, labels, microbatch)


def our_side(model_path: Path, dtype: str, length: int) -> Side:
    """Return engine/trainer.py's step: Megatron model, low-rank parallel linears, DeepSpeed ZeRO 1 on the factors."""
    topology = Topology.build(1, 1, None, timeout_seconds=600)
    model = load_model(
        model_path,
        check_model(model_path, 1, length),
        topology,
        device=torch.device("cpu"),
        dtype=dtype,
        vocab_multiple=128,
        broadcast=False,
    )
    masks = MaskSource(0, 0)
    rules = LoraRules(RANK, ALPHA, "all-linear", False, {}, {})
    adapted = inject(model, place_factors(model.architecture, rules), masks, 0, topology.tp_rank, topology.tp_size)
    parameters = [parameter for linear in adapted for parameter in linear.factors.parameters()]
    optimiser = ZeroOptimiser(parameters, topology, OptimiserRules(1, CLIP, None, 0.0, (0.9, 0.999), 1e-8))
    model.train()

    def step(batch: Batch) -> float:
        m = batch.microbatch
        masks.set(0, m.dropout_rows)
        targets = m.target_ids.numel()
        total = optimiser.accumulate(
            lambda: model.loss(m.input_ids, m.position_ids, m.target_index, m.target_ids, m.segments), 1 / targets, True
        )
        optimiser.step(LR)
        return total.item() / targets

    return Side(step, sum(parameter.numel() for parameter in parameters))


def peft_side(model_path: Path, dtype: str) -> Side:
    """Return a usual loop with transformers and PEFT: SDPA attention, no cache, their own loss, foreach AdamW."""
    options = {"attn_implementation": "sdpa", "local_files_only": True, "use_safetensors": True}
    base = AutoModelForCausalLM.from_pretrained(
        model_path, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], **options
    )
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", bias="none", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    optimiser = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, foreach=True)
    model.train()

    def step(batch: Batch) -> float:
        loss = model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.item()

    return Side(step, sum(parameter.numel() for parameter in parameters))


def read_tokens(batch: int, length: int) -> torch.Tensor:
    """Return [b, s] int64: the quickstart's training text, one sample after the other, split into rows."""
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "base", local_files_only=True)
    ids: list[int] = []
    for line in (QUICKSTART / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        ids += [*tokenizer(fields["prompt"] + fields["completion"])["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= batch * length:
            return torch.tensor(ids[: batch * length]).view(batch, length)
    sys.exit(f"the training text has fewer than {batch} * {length} tokens; lower --batch or --length")


def timed(step: Callable[[Batch], float], batch: Batch) -> tuple[float, float]:
    """(seconds, loss) of one step."""
    started = time.perf_counter()
    loss = step(batch)
    return time.perf_counter() - started, loss


def measure(ours: Side, peft: Side, batch: Batch, pairs: int) -> dict[str, object]:
    """Return both tokens/s and the ratio (median and quartiles) over interleaved pairs, after a warm-up step each."""
    sides, seconds = (ours, peft), ([], [])
    for pair in range(pairs + 1):
        for which in (0, 1) if pair % 2 else (1, 0):
            spent, _ = timed(sides[which].step, batch)
            if pair:
                seconds[which].append(spent)
    ratios = [theirs / mine for mine, theirs in zip(*seconds, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    tokens = batch.input_ids.numel()
    return {
        "ours_tokens_per_second": tokens / statistics.median(seconds[0]),
        "peft_tokens_per_second": tokens / statistics.median(seconds[1]),
        "ratio": median,
        "ratio_quartiles": [low, high],
        "ratios": ratios,
    }


def require_same_work(ours: Side, peft: Side, batch: Batch, dtype: str) -> None:
    """Exit unless both sides train equally many parameters from the same loss: else the ratio means nothing."""
    if ours.trained != peft.trained:
        sys.exit(f"we train {ours.trained} parameters, PEFT {peft.trained}")
    mine, theirs = ours.step(batch), peft.step(batch)
    if not abs(mine - theirs) <= LOSS_TOLERANCE[dtype] * theirs:
        sys.exit(f"{dtype}: our first loss is {mine:.6f}, PEFT's {theirs:.6f}")


def run(args: argparse.Namespace, console: Console) -> list[dict[str, object]]:
    """Run all settings, one dtype after the other, so that only two models are in memory."""
    tokens = read_tokens(args.batch, args.length)
    settings = [(dtype, float(share)) for dtype, share in (setting.split(":") for setting in args.settings)]
    rows = []
    for dtype in dict.fromkeys(dtype for dtype, _ in settings):
        ours = our_side(QUICKSTART / "base", dtype, args.length)
        peft = peft_side(QUICKSTART / "base", dtype)
        for number, share in enumerate(share for wanted, share in settings if wanted == dtype):
            batch = make_batch(tokens, share)
            if number == 0:
                require_same_work(ours, peft, batch, dtype)
            rows.append({"dtype": dtype, "prompt_share": share, **measure(ours, peft, batch, args.pairs)})
            console.print(f"{dtype}, prompt share {share}: {rows[-1]['ratio']:.3f}")
        del ours, peft
        gc.collect()
    return rows


def show(rows: list[dict[str, object]], console: Console) -> None:
    table = Table("base", "prompt share", "ours, tokens/s", "PEFT, tokens/s", "ratio", "quartiles")
    for row in rows:
        low, high = row["ratio_quartiles"]
        speeds = (f"{row[key]:.0f}" for key in ("ours_tokens_per_second", "peft_tokens_per_second"))
        table.add_row(
            row["dtype"], str(row["prompt_share"]), *speeds, f"{row['ratio']:.3f}", f"{low:.3f} to {high:.3f}"
        )
    console.print(table)


def join_alone() -> None:
    """Start a process group of this process only."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    init_process_group(select_backend("cpu"), timeout_seconds=600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [f"{dtype}:{share}" for dtype in LOSS_TOLERANCE for share in SHARES]
    parser.add_argument("--settings", nargs="+", default=every, choices=every, metavar="DTYPE:SHARE", help=str(every))
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--torch-gemm", action="store_true", help="our large GEMMs by torch.mm too: compares structure alone"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.torch_gemm:
        linear._onednn_is_faster = lambda *_: False
    quiet_libraries()
    started_on, console = machine(), Console()
    subprocess.run([sys.executable, "-m", "launch.quickstart.prepare"], cwd=ROOT, check=True)
    join_alone()
    rows = run(args, console)
    show(rows, console)
    shutdown(clean=True)
    headline = [row["ratio"] for row in rows if (row["dtype"], row["prompt_share"]) == HEADLINE]
    # Saved are the whole table and, of the comparison with torch.mm, the headline.
    if headline and (args.torch_gemm or sorted(args.settings) == sorted(every)):
        facts = {name: getattr(args, name) for name in ("pairs", "batch", "length", "threads", "torch_gemm")}
        name = "throughput_torch_gemm" if args.torch_gemm else "throughput"
        write_result(name, started_on, {**facts, "settings": rows, "ratio_vs_peft": headline[0]})
    if headline:
        print(f"ratio_vs_peft={headline[0]:.3f}")


if __name__ == "__main__":
    main()
