"""All imports of a rank, loaded once by the process from which tests fork their ranks (tests/forked.py)."""

from __future__ import annotations

import os

# DeepSpeed chooses its accelerator at import. Ranks on a GPU are not forked.
os.environ["DS_ACCELERATOR"] = "cpu"

import torch

from lowrank_dist.backend.libraries import exempt_from_gc, quiet_libraries

quiet_libraries()
with exempt_from_gc():
    import peft  # noqa: F401
    import transformers.models.auto.modeling_auto  # noqa: F401

    import lowrank_dist.cli.main
    import lowrank_dist.engine.assemble
    import lowrank_dist.generate.session
    import lowrank_dist.methods.bottleneck.method
    import lowrank_dist.methods.full.method
    import lowrank_dist.methods.lora.method
    import lowrank_dist.methods.prefix.method
    import lowrank_dist.methods.prompt.method
    import lowrank_dist.model.load  # noqa: F401

torch.set_num_threads(1)
