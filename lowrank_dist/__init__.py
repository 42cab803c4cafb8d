"""Low-rank fine-tuning of large language models on a frozen base sharded by Megatron tensor parallelism.

The Python API: `load_config`, what it returns, and the errors. A name is imported when it is first used, so that
`import lowrank_dist` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowrank_dist.config import Config, load_config
    from lowrank_dist.errors import ConfigError, UserError

__version__ = "0.2.0"
__all__ = ["Config", "ConfigError", "UserError", "__version__", "load_config"]

_MODULES = {
    "Config": "config",
    "ConfigError": "errors",
    "UserError": "errors",
    "load_config": "config",
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
