"""Train low-rank factors, or what another `method` trains, on a tensor-parallel base.

    deepspeed --num_gpus 4 launch/train.py configs/FILE.yaml [section.key=value ...]

Exit code 0 on success, 2 for a mistake in the input (one message, no traceback), 85 where the run was told to stop
(SIGUSR1, SIGUSR2 or SIGTERM to any rank), saved and can go on, 1 for anything else.
"""

from __future__ import annotations

import logging
import sys

from lowrank_dist.backend.collector import lasting
from lowrank_dist.backend.hostfile import refuse_missing_hostfile
from lowrank_dist.backend.select import init_process_group, local_rank_and_size, quiet_libraries, select_backend
from lowrank_dist.backend.slurm import ranks_from_slurm
from lowrank_dist.config import Config, ConfigError, load_config
from lowrank_dist.errors import UserError
from lowrank_dist.supervision.rank import PREEMPTED, USER_ERROR, Supervision, speaks_for_node


def main(config: Config, supervision: Supervision) -> int:
    """Compose one run from its configuration and run it. Returns the exit code."""
    quiet_libraries()
    refuse_missing_hostfile()
    # Imported here: a mistake in the configuration should not wait for Megatron and transformers to load.
    with lasting():
        from lowrank_dist.engine import assemble
        from lowrank_dist.engine.datasets import build_data
        from lowrank_dist.engine.forecast import Forecast
        from lowrank_dist.engine.resume import complete, find_resumption
        from lowrank_dist.methods.choose import choose
        from lowrank_dist.model.build import check_model, load_model
        from lowrank_dist.parallel.topology import Topology

    backend = select_backend(config.model.device, *local_rank_and_size())
    assemble.choose_kernels(config.engine.kernels, backend.device.type)
    folder = assemble.prepare_folder(config)
    supervision.enter("meeting")
    parallel, timeout = config.parallel, config.engine.timeout_seconds
    init_process_group(backend, timeout)
    topology = Topology.build(
        parallel.tensor, parallel.data, parallel.sequence, timeout, across_nodes=parallel.across_nodes
    )
    supervision.hosts = topology.hosts
    supervision.enter("model")
    resumption = find_resumption(config, folder, topology)
    config = complete(config, resumption)
    architecture = check_model(config.model.path, topology.tp_size, config.data.max_length)
    method = choose(config, architecture)
    forecast = Forecast(config, architecture, topology, backend)
    model = load_model(
        config.model.path,
        architecture,
        topology,
        device=backend.device,
        dtype=config.model.dtype,
        vocab_multiple=config.model.vocab_multiple,
        broadcast=config.model.load == "broadcast",
    )
    theta = assemble.build_theta(model, method, config, topology, resumption)
    supervision.enter("data set")
    data = build_data(config, method, model.architecture, topology)
    assemble.check_resumption(resumption, config, data)
    # Only now: a start that fails for its input leaves no folder that would refuse the corrected one.
    folder.open(topology.world_group.rank(), config.to_yaml())
    supervision.in_folder(folder.path)
    supervision.enter("optimiser state")
    trainer = assemble.build_trainer(
        model, method, theta, data, config, folder, resumption, forecast, supervision, topology, backend
    )
    return 0 if trainer.run() else PREEMPTED


def run(arguments: list[str]) -> int:
    """One rank, from its command line to its exit code."""
    logging.getLogger().addHandler(logging.NullHandler())  # records go to the run folder; what to print is said apart
    try:
        ranks_from_slurm()
        config = load_config(arguments)
    except (ConfigError, UserError) as error:
        if speaks_for_node():
            print(f"lowrank_dist: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    with Supervision(config.engine.timeout_seconds) as supervision:
        try:
            code = main(config, supervision)
        except BaseException as error:  # a library's sys.exit and Ctrl-C as well
            code = supervision.failed(error)
        supervision.leave(code)
    return code


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
