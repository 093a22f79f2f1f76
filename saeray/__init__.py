"""saeray: distributed sweeps of sparse autoencoders, one language-model pass for the whole grid.

    from saeray import LanguageModelSAERunnerConfig, language_model_sae_runner, sweep, SAETrial

Names are resolved when they are first used, so that `import saeray.config` or `import saeray.sae`
brings in neither Ray nor a language model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "ConfigError": "saeray.errors",
    "LanguageModelSAERunnerConfig": "saeray.config",
    "Resources": "saeray.config",
    "SAETrial": "saeray.cluster.trial",
    "StandardSAE": "saeray.sae.standard",
    "language_model_sae_runner": "saeray.runner",
    "load_sae": "saeray.checkpoint",
    "resume": "saeray.runner",
    "runtime_env": "saeray.connect",
    "sweep": "saeray.runner",
}

if TYPE_CHECKING:
    from saeray.checkpoint import load_sae
    from saeray.cluster.trial import SAETrial
    from saeray.config import LanguageModelSAERunnerConfig, Resources
    from saeray.connect import runtime_env
    from saeray.errors import ConfigError
    from saeray.runner import language_model_sae_runner, resume, sweep
    from saeray.sae.standard import StandardSAE


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'saeray' has no attribute {name!r}")


__all__ = [
    "ConfigError",
    "LanguageModelSAERunnerConfig",
    "Resources",
    "SAETrial",
    "StandardSAE",
    "__version__",
    "language_model_sae_runner",
    "load_sae",
    "resume",
    "runtime_env",
    "sweep",
]
