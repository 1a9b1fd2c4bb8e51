"""m2mKD in JAX: module-to-module knowledge distillation for modular transformers.

The method is that of arXiv 2402.16918. What `__all__` names is public, see docs/library.md;
everything else may change.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name: the module that has it. Imported at first use, so that the package stays free of jax.
_WHERE = {
    "Model": "inference",
    "build": "inference",
    "load": "inference",
    "Setup": "jobs.setup",
    "training_step": "jobs.setup",
    "Program": "phases.program",
    "make_optimizer": "train.optimizer",
    "make_step": "train.step",
    "Student": "phases.families",
    "Network": "phases.families",
    "StudentFamily": "phases.families",
    "Teacher": "phases.families",
    "register_family": "phases.families",
    "StageSpec": "phases.phase",
    "WeightsFrom": "phases.phase",
    "Stage": "models.chain",
    "register_kind": "models.registry",
    "Interface": "models.registry",
    "save_weights": "checkpoint.store",
    "UserError": "errors",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
