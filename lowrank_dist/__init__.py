"""Low-rank fine-tuning of large language models on a frozen base sharded by Megatron tensor parallelism.

`__all__` is the Python API (docs/reference/python.md). A name of it is imported when it is first used, so that
`import lowrank_dist` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowrank_dist.config import Config, load_config
    from lowrank_dist.engine.inspection import inspect
    from lowrank_dist.engine.plan import plan
    from lowrank_dist.errors import ConfigError, UserError
    from lowrank_dist.formats.report import Report
    from lowrank_dist.merging.merge import MergeReport, merge
    from lowrank_dist.merging.options import OutputFormat, WeightedAdapter
    from lowrank_dist.methods.lora.load import Adapter, load_adapter
    from lowrank_dist.planner.layouts import Cluster
    from lowrank_dist.planner.result import Plan

__version__ = "0.2.0"
__all__ = [
    "Adapter",
    "Cluster",
    "Config",
    "ConfigError",
    "MergeReport",
    "OutputFormat",
    "Plan",
    "Report",
    "UserError",
    "WeightedAdapter",
    "__version__",
    "inspect",
    "load_adapter",
    "load_config",
    "merge",
    "plan",
]

_MODULES = {
    "Adapter": "methods.lora.load",
    "Cluster": "planner.layouts",
    "Config": "config",
    "ConfigError": "errors",
    "MergeReport": "merging.merge",
    "OutputFormat": "merging.options",
    "Plan": "planner.result",
    "Report": "formats.report",
    "UserError": "errors",
    "WeightedAdapter": "merging.options",
    "inspect": "engine.inspection",
    "load_adapter": "methods.lora.load",
    "load_config": "config",
    "merge": "merging.merge",
    "plan": "engine.plan",
}


if not TYPE_CHECKING:  # a type checker that saw it would take every name to be there

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
