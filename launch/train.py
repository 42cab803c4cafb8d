"""Train low-rank factors, or the parameters of another `method`, on a tensor-parallel base.

    deepspeed --num_gpus 4 launch/train.py configs/FILE.yaml [section.key=value ...]

Exit code 0 on success; 2 for an error in the input (one message, no traceback); 85 where the run was told to stop
(SIGUSR1, SIGUSR2 or SIGTERM to any rank), has saved and can be resumed; 1 for anything else.
"""

from __future__ import annotations

import logging
import sys

from lowrank_dist.backend.exhaustion import name_limits
from lowrank_dist.backend.launchers import refuse_missing_hostfile, set_rank_variables
from lowrank_dist.backend.libraries import exempt_from_gc, quiet_libraries
from lowrank_dist.backend.select import init_process_group, local_rank, select_backend
from lowrank_dist.config import HELP, Config, read_arguments
from lowrank_dist.errors import UserError
from lowrank_dist.supervision.rank import (
    PREEMPTED,
    USER_ERROR,
    Supervision,
    should_print_before_meeting,
    should_print_for_node,
)
from lowrank_dist.terminal import say


def main(config: Config, supervision: Supervision) -> int:
    """Build one run from its configuration and run it. Returns the exit code."""
    quiet_libraries()
    refuse_missing_hostfile()
    # Imported here, so that an error in the configuration is found before Megatron and transformers are loaded.
    with exempt_from_gc():
        from lowrank_dist.engine.agreement import require_same_start
        from lowrank_dist.engine.assemble import build_engine, build_topology, build_trainer, choose_kernels
        from lowrank_dist.engine.datasets import build_data
        from lowrank_dist.engine.forecast import Forecast, with_tensor_size
        from lowrank_dist.engine.run import Run
        from lowrank_dist.engine.run_folder import RunFolder
        from lowrank_dist.engine.run_method import build_method
        from lowrank_dist.model.load import check_model, load_model

    backend = select_backend(config.model.device, local_rank())
    choose_kernels(config.engine.kernels, backend.device.type)
    output, shaping = config.output, config.shaping
    folder = RunFolder.prepare(
        output.dir, config.train.resume, config.inputs, overwrite=output.overwrite, shaping=shaping
    )

    supervision.enter("meeting")  # the processes find each other and form the process groups
    backend = init_process_group(backend, config.engine.timeout_seconds)
    require_same_start(config, backend)
    config, layout_line = with_tensor_size(config, backend)
    topology = build_topology(config)
    supervision.hosts = topology.hosts

    supervision.enter("model")  # the sharded frozen base with Θ, the trained parameters, attached
    run = Run.begin(config, topology, backend, folder, supervision)
    config = run.config  # now completed by the adapter or the checkpoint
    ranks = topology.world_group.size()
    architecture = check_model(config.model.path, topology.tp_size, config.data.max_length, ranks)
    method = build_method(config, architecture)
    forecast = Forecast(config, architecture, topology, backend, layout_line)
    model = load_model(
        config.model.path,
        architecture,
        topology,
        device=backend.device,
        dtype=config.model.dtype,
        vocab_multiple=config.model.vocab_multiple,
        broadcast=config.model.load == "broadcast",
    )
    model.set_recompute(config.engine.recompute == "full")
    theta = method.attach(model, topology, resumed=run.resumption is not None)

    supervision.enter("data set")  # tokenised samples, divided over the data-parallel ranks
    data = build_data(config, method, architecture, topology, run.state, run.started_at)
    run.require_same(data)

    supervision.enter("optimiser state")  # ZeRO over Θ alone, and the training loop
    engine = build_engine(run, model, theta)
    trainer = build_trainer(run, method, engine, data, forecast)
    return 0 if trainer.train() else PREEMPTED


def start(arguments: list[str]) -> int:
    """Run one rank with the arguments of its command line. Returns or exits with its exit code."""
    logging.getLogger().addHandler(logging.NullHandler())  # records go to the run folder; `say` prints
    if not {"--help", "-h"}.isdisjoint(arguments):
        if should_print_for_node():
            say(HELP)
        return 0
    try:
        with name_limits():
            set_rank_variables()
            notes: list[str] = []
            config = read_arguments(arguments, notes.append, require_data=True)
        with Supervision(config.engine.timeout_seconds) as supervision:
            for line in notes if supervision.rank == 0 else ():
                say(line)
            try:
                code = main(config, supervision)
            except BaseException as error:  # a library's sys.exit and Ctrl-C as well
                code = supervision.failed(error)
            supervision.leave(code)
    except UserError as error:
        if should_print_before_meeting(error):
            say(f"lowrank_dist: {error}", err=True)
        return USER_ERROR
    return code


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
