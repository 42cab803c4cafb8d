"""Low-rank fine-tuning of large language models on a frozen base sharded by Megatron tensor parallelism.

The Python API: `load_config`, what it returns, and the errors. A name is imported when it is first used, so that
`import lowrank_dist` loads no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

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


class _Package(ModuleType):
    """This package as a module, whose public names are imported on first use."""

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # Importing a room binds it here. The functions `plan` and `merge` have the names of rooms, and stay functions.
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
