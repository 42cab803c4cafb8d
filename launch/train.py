"""Train low-rank factors on a frozen, tensor-parallel base.

    deepspeed --num_gpus 4 launch/train.py configs/FILE.yaml [section.key=value ...]

Exit code 0 on success, 2 for a mistake in the input (one message, no traceback), 1 for anything else.
"""

from __future__ import annotations

import logging
import sys

from lowrank_dist.backend.hostfile import refuse_missing_hostfile
from lowrank_dist.backend.select import (
    announces_failure,
    init_process_group,
    local_rank_and_size,
    quiet_libraries,
    select_backend,
    shutdown,
)
from lowrank_dist.config import Config, ConfigError, load_config
from lowrank_dist.errors import UserError


def main(config: Config) -> None:
    """Compose one run from its configuration and run it."""
    quiet_libraries()
    refuse_missing_hostfile()
    # Imported here: a mistake in the configuration should not wait for Megatron and transformers to load.
    from lowrank_dist.engine import assemble
    from lowrank_dist.engine.resume import complete, find_resumption
    from lowrank_dist.model.build import load_model
    from lowrank_dist.parallel.topology import Topology

    backend = select_backend(config.model.device, *local_rank_and_size())
    assemble.choose_kernels(config.engine.kernels, backend.device.type)
    folder = assemble.prepare_folder(config)
    init_process_group(backend, config.engine.timeout_seconds)
    parallel = config.parallel
    topology = Topology.build(parallel.tensor, parallel.data, parallel.sequence, config.engine.timeout_seconds)
    resumption = find_resumption(config, folder, topology)
    config = complete(config, resumption)
    model = load_model(
        config.model.path,
        topology,
        device=backend.device,
        dtype=config.model.dtype,
        max_length=config.data.max_length,
        vocab_multiple=config.model.vocab_multiple,
        broadcast=config.model.load == "broadcast",
    )
    theta = assemble.build_theta(model, config, topology, resumption)
    data = assemble.build_data(config, model.architecture.vocab, topology)
    assemble.check_resumption(resumption, config, data)
    # Only now: a start that fails for its input leaves no folder that would refuse the corrected one.
    folder.open(topology.world_group.rank(), config.to_yaml())
    assemble.build_trainer(model, theta, data, config, folder, resumption, topology, backend).run()


if __name__ == "__main__":
    code = 0
    logging.getLogger().addHandler(logging.NullHandler())  # records go to the run folder; what to print is said below
    try:
        main(load_config(sys.argv[1:]))
    except (ConfigError, UserError) as error:
        code = 2
        logging.getLogger(__name__).error("%s", error)
        if announces_failure():
            print(f"lowrank_dist: {error}", file=sys.stderr, flush=True)
    except Exception:
        code = 1
        logging.getLogger(__name__).exception("rank failed")
        raise
    finally:
        shutdown(clean=code == 0)
    sys.exit(code)
