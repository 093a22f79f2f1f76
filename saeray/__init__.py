"""saeray: distributed sweeps of sparse autoencoders, one language-model pass for the whole grid.

    from saeray import LanguageModelSAERunnerConfig, language_model_sae_runner, sweep, SAETrial

Names are resolved when they are first used, so that `import saeray.spec` or `import saeray.sae`
brings in neither Ray nor a language model. Each folder is a floor, and imports go down only
(`tests/test_floors.py` has the list).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from saeray.version import __version__

_WHERE = {
    "ConfigError": "saeray.errors",
    "LanguageModelSAERunnerConfig": "saeray.spec.config",
    "Resources": "saeray.spec.config",
    "SAECfg": "saeray.files.sae_cfg",
    "SAETrial": "saeray.cluster.trial",
    "StandardSAE": "saeray.sae.architectures.standard",
    "compare": "saeray.client.choose",
    "export": "saeray.client.sharing",
    "language_model": "saeray.lm.inside",
    "language_model_sae_runner": "saeray.client.runner",
    "latents": "saeray.lm.inside",
    "load_sae": "saeray.files.find_sae",
    "load_sweep": "saeray.client.result",
    "plan": "saeray.client.planning",
    "pull": "saeray.client.sharing",
    "push": "saeray.client.sharing",
    "resume": "saeray.client.runner",
    "runtime_env": "saeray.client.connect",
    "spliced": "saeray.lm.inside",
    "sweep": "saeray.client.runner",
}

if TYPE_CHECKING:
    from saeray.client.choose import compare
    from saeray.client.connect import runtime_env
    from saeray.client.planning import plan
    from saeray.client.result import load_sweep
    from saeray.client.runner import language_model_sae_runner, resume, sweep
    from saeray.client.sharing import export, pull, push
    from saeray.cluster.trial import SAETrial
    from saeray.errors import ConfigError
    from saeray.files.find_sae import load_sae
    from saeray.files.sae_cfg import SAECfg
    from saeray.lm.inside import language_model, latents, spliced
    from saeray.sae.architectures.standard import StandardSAE
    from saeray.spec.config import LanguageModelSAERunnerConfig
    from saeray.spec.resources import Resources


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'saeray' has no attribute {name!r}")


__all__ = [
    "ConfigError",
    "LanguageModelSAERunnerConfig",
    "Resources",
    "SAECfg",
    "SAETrial",
    "StandardSAE",
    "__version__",
    "compare",
    "export",
    "language_model",
    "language_model_sae_runner",
    "latents",
    "load_sae",
    "load_sweep",
    "plan",
    "pull",
    "push",
    "resume",
    "runtime_env",
    "spliced",
    "sweep",
]
