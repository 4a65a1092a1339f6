"""Compares a checkpoint with the run that loads it: whose state it is, and which options apply where the two differ."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch.distributed as dist

ResumeOptions = Literal["checkpoint", "given"]
"""Which options apply after a resume: those the checkpoint was trained with, or those of this run."""


def kind_of(state: Mapping[str, Any]) -> str:
    """Return the name of the strategy that wrote a rule's state.

    Example:
        >>> kind_of({})
        'fixed weights'
    """
    # GradNorm's states of older versions do not store it.
    otherwise = "GradNorm" if "initial_losses" in state else "no known strategy"
    return str(state.get("kind", otherwise)) if state else "fixed weights"


def check_kind(state: Mapping[str, Any], kind: str, version: int, *, caller: str) -> None:
    """Refuse a state from another strategy, or from another version of this one.

    Args:
        state: of a rule.
        kind: the strategy whose state it should be.
        version: of the state's layout.
        caller: begins the message.

    Raises:
        ValueError: the state is from another strategy or version; names both.

    Example:
        >>> check_kind({"kind": "UW", "version": 1}, "GradNorm", 1, caller="GradNorm")
        Traceback (most recent call last):
        ValueError: GradNorm: the state should be from GradNorm; it is from UW. Resume with the strategy that wrote it.
    """
    if (found := kind_of(state)) != kind:
        way_out = "Resume with the strategy that wrote it" + (
            "." if state else "; or load none, to begin balancing now."
        )
        raise ValueError(f"{caller}: the state should be from {kind}; it is from {found}. {way_out}")
    if state.get("version") != version:
        raise ValueError(
            f"{caller}: the state of {kind} should be of version {version}; got {state.get('version')!r}. Resume with the "
            f"version of lightning-gradnorm that wrote it."
        )


def check_state(state: Mapping[str, Any], tasks: Sequence[str], kind: str, version: int, *, adapt: bool) -> None:
    """Refuse a state of other tasks, unless ``adapt`` is set; one of another strategy or version; or a damaged one.

    Raises:
        ValueError: the state is refused.
    """
    check_kind(state, kind, version, caller=kind)
    known = state["tasks"]
    if set(known) != set(tasks) and not adapt:
        raise ValueError(
            f"{kind}: the checkpoint has tasks {sorted(known)}, but this run has {sorted(tasks)}. Resume with the "
            f"same tasks; or with on_task_mismatch='adapt', which keeps what is known and gives new tasks the mean."
        )
    for name in ("weights", "weights_mean", "initial_losses", "updates_seen"):
        if state[name].shape != (len(known),):
            found = tuple(state[name].shape)
            raise ValueError(
                f"{kind}: the checkpoint is damaged: {name} should be of shape ({len(known)},); got {found}."
            )


def say_what_is_in_force(option: str, saved: object, given: object, resume_options: ResumeOptions) -> None:
    """Warn, on the first rank, that an option differs from the checkpoint's, and which of the two is in force."""
    in_force, otherwise = ("this run's", "checkpoint") if resume_options == "given" else ("the checkpoint's", "given")
    say(
        f"{option} is {saved} in the checkpoint and {given} here; {in_force} applies. For the other, resume with "
        f"resume_options='{otherwise}'."
    )


def say(message: str) -> None:
    """Warn on the first rank."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0):
        warnings.warn(f"GradNorm: {message}", stacklevel=4)
