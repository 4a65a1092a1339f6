"""Loss balancing for Lightning: GradNorm, and every other strategy, as a callback.

The names below are imported on first use, so that ``lightning_gradnorm.engine`` and the other pure-torch subpackages can be
imported without Lightning.
"""

from typing import TYPE_CHECKING

from lightning_gradnorm import _moved

__all__ = [
    "Aggregation",
    "Balancer",
    "FixedWeights",
    "GradNorm",
    "GradNormStatic",
    "GradientNormMonitor",
    "InverseNorm",
    "LRAnnealing",
    "MultiTaskModule",
    "NTKWeights",
    "NormWeighting",
    "RandomWeights",
    "Scalarization",
    "Task",
    "gradient_norms",
]

__version__ = "0.1.0.dev0"

_moved.install()

if TYPE_CHECKING:  # what type checkers and editors see; at run time it is `_HOMES`
    from lightning_gradnorm.callbacks import (
        Aggregation,
        FixedWeights,
        GradNorm,
        GradNormStatic,
        NormWeighting,
        RandomWeights,
        Scalarization,
    )
    from lightning_gradnorm.engine import Balancer
    from lightning_gradnorm.gradients import gradient_norms
    from lightning_gradnorm.monitor import GradientNormMonitor
    from lightning_gradnorm.multitask import MultiTaskModule, Task
    from lightning_gradnorm.strategies import InverseNorm, LRAnnealing, NTKWeights
else:
    import importlib

    _HOMES = {
        "callbacks": (
            "Aggregation",
            "FixedWeights",
            "GradNorm",
            "GradNormStatic",
            "NormWeighting",
            "RandomWeights",
            "Scalarization",
        ),
        "engine": ("Balancer",),
        "gradients": ("gradient_norms",),
        "monitor": ("GradientNormMonitor",),
        "multitask": ("MultiTaskModule", "Task"),
        "strategies": ("InverseNorm", "LRAnnealing", "NTKWeights"),
    }

    def __getattr__(name: str) -> object:
        """Import a public name or a subpackage; called once for each, and for names that do not exist."""
        for home, names in _HOMES.items():
            if name == home or name in names:
                module = importlib.import_module(f"{__name__}.{home}")
                globals()[name] = module if name == home else getattr(module, name)
                return globals()[name]
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_HOMES})
