"""A whole training step never leaves its device: tested without a GPU, on the meta device, which mixes with no other.

Whatever would stop a CUDA run (an index, a mask or a sum made on the CPU by oversight) stops here too. Collectives are
those of torch's fake process group; this process is one rank of two.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from tests import forked
from tests.dist.tiny_runs import Setting
from tests.tiny_models import make_tiny

SETTINGS = {
    f"{family}, {'sequence parallel' if sequence else 'replicated'}, {'packed' if packing else 'unpacked'}": (
        family,
        Setting("", 2, sequence, dropout=0.1, packing=packing, recompute=packing, dtype=dtype),
    )
    for (family, dtype), sequence, packing in itertools.product(
        (("llama", "fp32"), ("gpt2", "bf16")), (True, False), (True, False)
    )
}


def devices_of_a_step(settings: list[Setting], broken: str) -> list[set[str] | str]:
    """In a process of its own: return, by setting, the devices of a step's tensors, or the error that stopped it."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from lowrank_dist.backend import megatron
    from lowrank_dist.model import load
    from tests.dist import ranks
    from tests.dist.tiny_runs import build, microbatches

    device = torch.device("meta")
    torch.cuda.current_device = lambda: device
    load._check_tied = load._fill = lambda *_: None  # meta tensors have no values to fill
    megatron.prepare(device)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    found: list[set[str] | str] = []
    for setting in settings:
        ranks._device = device
        model, adapted, masks, topology = build(setting)
        made = [*model.parameters(), *model.buffers()]
        if broken == "batch":
            ranks._device = torch.device("cpu")
        try:
            for b in microbatches(setting, 0, 1, topology.tp_size)[0]:
                masks.set(0, b.dropout_rows.new_zeros(b.dropout_rows.shape, device="cpu" if broken else device))
                loss = model.loss(b.input_ids, b.position_ids, b.target_index, b.target_ids, b.segments)
                loss.backward()
                made += [loss, model.logits(b.input_ids, b.position_ids, b.segments)]
        except RuntimeError as error:
            found.append(str(error))
            continue
        made += [parameter.grad for linear in adapted for parameter in linear.factors.parameters()]
        found.append({str(tensor.device) for tensor in made})
    return found


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[Setting]:
    base = tmp_path_factory.mktemp("devices")
    folders = {family: str(make_tiny(family, base / family)) for family, _ in SETTINGS.values()}
    return [replace(setting, folder=folders[family]) for family, setting in SETTINGS.values()]


def apart(settings: list[Setting], broken: str) -> list[set[str] | str]:
    with forked.context().Pool(1) as pool:
        return pool.apply(devices_of_a_step, (settings, broken))


def test_a_step_stays_on_its_device(settings: list[Setting]) -> None:
    assert dict(zip(SETTINGS, apart(settings, ""), strict=True)) == dict.fromkeys(SETTINGS, {"meta"})


@pytest.mark.parametrize("broken", ["batch", "mask rows"])
def test_notices_a_tensor_that_stayed_behind(settings: list[Setting], broken: str) -> None:
    """Negative control: token ids, or the rows of the dropout masks alone, stay on the CPU."""
    for error in apart(settings[:2], broken):
        assert isinstance(error, str) and "meta" in error and "cpu" in error
