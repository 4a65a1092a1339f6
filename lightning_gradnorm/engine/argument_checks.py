"""Checks of `Balancer`'s arguments, before it touches the model; callbacks use some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_gradnorm._messages import check, check_by_task, kind_of
from lightning_gradnorm.engine.measurement import Setting
from lightning_gradnorm.engine.rule import Rule
from lightning_gradnorm.engine.step_state import WatchedLoss

_NEEDS = ("nothing", "losses", "norms", "gradients")


def check_arguments(model: object, rule: object, shared_layer: object, heads: object, norm_of: object) -> None:
    """Check the types of `Balancer`'s arguments.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    if getattr(type(rule), "needs", None) not in _NEEDS:
        hint = " That is a callback for a Lightning Trainer." if hasattr(rule, "on_train_start") else ""
        if isinstance(rule, nn.Module):
            hint = " Give it to ScalarizationRule or AggregationRule, and the rule to Balancer."
        raise TypeError(
            f"Balancer: rule should be a rule such as GradNormRule(['seg', 'depth']); got {kind_of(rule)}.{hint}"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"Balancer: model should be a module; got {type(model).__name__}")
    check("Balancer", norm_of in ("weight", "activation"), "norm_of", "'weight' or 'activation'", norm_of)
    check_shared_layer(shared_layer, caller="Balancer")
    check_heads(heads, (), caller="Balancer")


def check_shared_layer(shared_layer: object, *, caller: str) -> None:
    """Check that the shared layer is named in a form that `find_shared_layers` accepts, or is None."""
    names = shared_layer if isinstance(shared_layer, Sequence) and shared_layer else [shared_layer]
    is_name = shared_layer is None or all(isinstance(name, str) for name in names)
    expected = "a dotted name such as 'encoder.4', a list of such names, 'all', or None"
    check(caller, is_name, "shared_layer", expected, shared_layer)


def check_places(shared_layer: object, representation: object, norm_of: object, *, caller: str) -> None:
    """Check a callback's options for where the gradients are read."""
    check_shared_layer(shared_layer, caller=caller)
    is_name = isinstance(representation, str)
    check(caller, is_name, "representation", "a dotted name such as 'encoder'", representation)
    check(caller, norm_of in ("weight", "activation"), "norm_of", "'weight' or 'activation'", norm_of)


def require_agreement(setting: Setting, rule: Rule) -> None:
    """Compare the arguments of all ranks.

    Raises:
        ValueError: they disagree; raised on all ranks.
    """
    compared: dict[str, object] = {"tasks": list(rule.tasks), "rule": type(rule).__name__}
    compared |= {name: getattr(setting, name) for name in ("shared_layer", "heads", "representation", "norm_of")}
    compared["initial weights"] = rule.loss_weights.tolist()
    setting.loop.ranks.require_agreement(setting.caller, {what: str(value) for what, value in compared.items()})


def check_heads(heads: object, tasks: Sequence[str], *, caller: str) -> None:
    """Check the heads that you name. ``tasks`` may be empty, if they are not known yet.

    Raises:
        TypeError: ``heads`` is not a mapping between names, "auto" or None.
        ValueError: it does not name exactly the tasks.
    """
    is_mapping = isinstance(heads, Mapping) and all(isinstance(head, str) for head in heads.values())
    if not (is_mapping or heads is None or heads == "auto"):
        raise TypeError(
            f"{caller}: heads should be a mapping from task to the name of its head, 'auto' or None; got {heads!r}"
        )
    if isinstance(heads, Mapping) and tasks:
        check_by_task(heads, tasks, caller=caller, parameter="heads")


def check_names(given: Mapping[str, Any], tasks: tuple[str, ...], parameter: str) -> None:
    """Raise ValueError, with a suggestion, if a name is not a task."""
    check_by_task(given, tasks, caller="Balancer", parameter=parameter, may_lack=True)


def check_losses(losses: object, tasks: tuple[str, ...], waiting: Mapping[str, Sequence[WatchedLoss]]) -> None:
    """Raise an error unless this maps tasks to losses, and none of these tasks has a loss waiting for its backward pass."""
    if not isinstance(losses, Mapping):
        raise TypeError(f"Balancer: losses should be a mapping from task to loss; got {type(losses).__name__}")
    check_names(losses, tasks, "losses")
    for task, loss in losses.items():
        if loss is not None and any(one.tensor is not loss for one in waiting.get(task, ())):
            raise ValueError(
                f"Balancer: the loss of task '{task}' was given before and has not been back-propagated. Give the losses of a "
                f"batch once, and only if you back-propagate them. That step is dropped now."
            )


def check_losses_after_step(rule: Rule, losses_after_step: object) -> None:
    """Raise ValueError if the rule needs ``losses_after_step`` and you have not passed it."""
    if losses_after_step is None and getattr(rule, "needs_losses_after_step", False):
        kind = getattr(rule, "kind", type(rule).__name__)
        raise ValueError(
            f"Balancer: {kind} needs the losses of the batch again after the optimizer's step: "
            f"balancer.step(losses_after_step=lambda: {{'{rule.tasks[0]}': …}})."
        )
