"""`python -m lowrank_dist.cli`, the form in which launchers that start modules run the command:

deepspeed --hostfile HOSTS --module lowrank_dist.cli doctor CONFIG
torchrun --nnodes 2 … --module lowrank_dist.cli doctor CONFIG
"""

from __future__ import annotations

import sys

from lowrank_dist.cli.main import app

if __name__ == "__main__":
    # deepspeed puts --local_rank=N before the command's name; LOCAL_RANK says the same.
    app([word for word in sys.argv[1:] if not word.startswith("--local_rank=")], prog_name="lowrank-dist")
