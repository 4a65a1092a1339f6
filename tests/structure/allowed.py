"""What breaks a rule of the architecture today, and why. Entries may only be removed; one that is no longer needed fails."""

from __future__ import annotations

from collections.abc import Collection, Mapping

_ENGINE = "the engine is being separated from Lightning's Trainer"
_SPLIT = "is being split"

IMPORTS: Mapping[tuple[str, str], str] = {
    ("engine/compiled.py", "lightning"): _ENGINE,
    ("engine/gathering.py", "lightning"): _ENGINE,
    ("engine/loss_scale.py", "lightning"): _ENGINE,
    ("engine/ranks.py", "lightning"): _ENGINE,
    ("engine/reader_choice.py", "lightning"): _ENGINE,
    ("engine/shared_parameters.py", "lightning"): _ENGINE,
    ("engine/usage_checks.py", "lightning"): _ENGINE,
    ("monitor/callback.py", "callbacks"): "strategies and monitor are to share one loss source",
    ("multitask/module.py", "callbacks"): "the module finds balancing callbacks by their class",
    ("multitask/module.py", "monitor"): "the module finds the monitor by its class",
    ("strategies/snapshot.py", "numpy"): "snapshots are being reduced to tensors and plain values",
}
"""(file, part of the package or third-party package) → reason."""

LONG_FILES: Mapping[str, str] = {
    "callbacks/base.py": _SPLIT,
    "monitor/callback.py": _SPLIT,
    "strategies/snapshot.py": "snapshots are being reduced to tensors and plain values",
}

LONG_CLASSES: Mapping[str, str] = {
    "callbacks/base.py:Balancing": _SPLIT,
    "monitor/callback.py:GradientNormMonitor": _SPLIT,
    "multitask/module.py:MultiTaskModule": _SPLIT,
}

DEEP_CLASSES: Mapping[str, str] = dict.fromkeys(
    ("Aggregation", "FixedWeights", "GradNormStatic", "RandomWeights", "Scalarization"),
    "the callbacks' base classes are being merged",
)

CORE_IS_TOO_LONG = "the engine and the snapshots are being rewritten"
"""The reason, or an empty string."""


def assert_only_allowed(
    found: Collection[object], allowed: Mapping[object, str] | Mapping[str, str], rule: str
) -> None:
    """Fail for a violation that is not allowed, and for an entry of ``allowed`` that is no violation any more."""
    new = sorted(map(str, set(found) - set(allowed)))
    gone = sorted(map(str, set(allowed) - set(found)))
    assert not new, f"{rule}: {new}"
    assert not gone, f"remove what has been mended from tests/structure/allowed.py: {gone}"
