"""All strategies for ``gradnorm-train balancing=…``.

Nothing is listed here by hand. The classes come from TorchJD, from `lightning_gradnorm.strategies` and from the public
callbacks. The names come from the files in ``conf/balancing``. Schemas, ``--help``, the documentation and the tests use
this module. A file in ``conf/balancing`` begins with a comment: what the strategy does, a line ``# (…)`` with its source,
and its formula after ``# Formula:``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import torch
from hydra.utils import get_object
from omegaconf import MISSING, OmegaConf
from torchjd import aggregation, scalarization

import lightning_gradnorm
from lightning_gradnorm import strategies
from lightning_gradnorm.experiments.strategy_kinds import SAYS_THE_TASKS, kind_of
from lightning_gradnorm.strategies.aggregation import AggregationRule
from lightning_gradnorm.strategies.factory import instantiate
from lightning_gradnorm.strategies.facts import Facts, facts_of
from lightning_gradnorm.strategies.norm_weighting import NormFormula
from lightning_gradnorm.strategies.scalarization import ScalarizationRule

Constructor = Callable[..., Any]

_BASES = (
    aggregation.Aggregator,
    aggregation.GramianWeightedAggregator,
    aggregation.WeightedAggregator,
    aggregation.Weighting,
    scalarization.Scalarizer,
)


def _public(*packages: ModuleType) -> list[Any]:
    return [getattr(package, name) for package in packages for name in package.__all__]


def _concrete(package: ModuleType, *kinds: type) -> tuple[Constructor, ...]:
    found = [one for one in _public(package, strategies) if isinstance(one, type) and issubclass(one, kinds)]
    by_name = {one.__name__: one for one in found if one not in _BASES}  # ours takes the place of TorchJD's
    return tuple(by_name.values())


def made_for_tasks(constructor: Constructor) -> tuple[str, ...]:
    """Return the required parameters that a configuration omits, because they follow from the number of tasks.

    Example:
        >>> made_for_tasks(scalarization.UW), made_for_tasks(scalarization.DWA)
        (('shape',), ())
    """
    if _is_callback(constructor):
        return ()
    parameters = inspect.signature(constructor).parameters.values()
    return tuple(p.name for p in parameters if p.name in SAYS_THE_TASKS and p.default is p.empty)


def _is_callback(constructor: Constructor) -> bool:
    return isinstance(constructor, type) and issubclass(constructor, L.Callback)


CALLBACKS: tuple[type[L.Callback], ...] = tuple(one for one in _public(lightning_gradnorm) if _is_callback(one))
"""The public callbacks, with schemas such as ``/schema/GradNorm``."""

SCALARIZERS: tuple[Constructor, ...] = (
    *_concrete(scalarization, scalarization.Scalarizer),
    *(one for one in _public(strategies) if inspect.isfunction(one) and "number_of_tasks" in made_for_tasks(one)),
)
"""With schemas such as ``/schema/scalarization/DWA``. Includes functions that make a scalarizer from the number of tasks."""

AGGREGATORS = _concrete(aggregation, aggregation.Aggregator, aggregation.Weighting)
"""Aggregators and weightings, with schemas such as ``/schema/aggregation/CAGrad``."""

FORMULAS: tuple[Constructor, ...] = tuple(
    one
    for one in _public(strategies)
    if isinstance(one, type) and issubclass(one, NormFormula) and one is not NormFormula
)
"""Formulas of gradient norms, with schemas such as ``/schema/norms/InverseNorm``."""

SCHEMAS: Mapping[str, Constructor] = {
    **{one.__name__: one for one in CALLBACKS},
    **{f"scalarization/{one.__name__}": one for one in SCALARIZERS},
    **{f"aggregation/{one.__name__}": one for one in AGGREGATORS},
    **{f"norms/{one.__name__}": one for one in FORMULAS},
}
"""Name of a schema, without ``/schema/`` → its constructor."""

_AMBIGUOUS = {one.__name__ for one in SCALARIZERS} & {one.__name__ for one in AGGREGATORS}

NEEDS = {
    "nothing": "nothing",
    "norms": "gradients of the last shared layer",
    "network": "gradients of the whole network",
    "losses": "losses",
    "representation": "gradients at the representation",
    "parameters": "gradients of the parameters",
}
"""The kinds of strategies, and their inputs in each step."""

_CALLBACK_FACTS = {
    "FixedWeights": ("", "as given"),
    "GradNorm": ("weights, L(0), optimizer", "T"),
}
"""State and sum of weights of callbacks that are strategies themselves. The sum is ``T`` by default."""


@dataclass(frozen=True)
class Part:
    """One object of a configuration: its constructor and options."""

    constructor: Constructor
    options: Mapping[str, Any]
    partial: bool = False

    def make(self) -> Any:
        """Return the object, or the function that creates it."""
        options = {name: value.make() if isinstance(value, Part) else value for name, value in self.options.items()}
        if not self.partial:
            return self.constructor(**options)
        return partial(self.constructor, **options) if options else self.constructor

    def __str__(self) -> str:
        """Return the Python expression."""
        name = self.constructor.__name__
        if name in _AMBIGUOUS and not self.constructor.__module__.startswith("lightning_gradnorm"):
            name = f"{self.constructor.__module__.split('.')[1]}.{name}"
        parameters = inspect.signature(self.constructor).parameters
        shown = {key: value for key, value in self.options.items() if not _is_default(value, parameters.get(key))}
        options = [f"{key}={value if isinstance(value, Part) else _python(value)}" for key, value in shown.items()]
        if self.partial:
            return f"partial({', '.join([name, *options])})" if options else name
        subject = next(iter(parameters), "")
        if _is_callback(self.constructor) and parameters[subject].default is inspect.Parameter.empty:
            options = [one.removeprefix(f"{subject}=") for one in options] or ["…"]
        return f"{name}({', '.join(options)})"


def _is_default(value: Any, parameter: inspect.Parameter | None) -> bool:
    """Return True if this creates the same optimizer as the default of an ``optimizer`` parameter."""
    if parameter is None or parameter.name != "optimizer" or not isinstance(value, Part):
        return False
    one, other = (make([torch.zeros(1, requires_grad=True)]) for make in (value.make(), parameter.default))
    return bool(type(one) is type(other) and one.defaults == other.defaults)


def _python(value: Any) -> str:
    return "…" if value is ... else repr(value).replace("'", '"')


@dataclass(frozen=True)
class Strategy:
    """One file in ``conf/balancing``."""

    name: str
    summary: str
    reference: str
    formula: str
    callback: Part | None
    """``None`` for plain training."""

    @property
    def kind(self) -> str:
        """The kind, a key of `NEEDS`."""
        if self._formula is not None and self._formula.of_all_parameters:
            return "network"
        return kind_of(self._callback_name, None if self.callback is None else self.callback.options.get("at"))

    @property
    def _formula(self) -> type[NormFormula] | None:
        """The class of its formula of gradient norms, if it has one."""
        part = None if self.callback is None else self.callback.options.get("rule")
        return part.constructor if isinstance(part, Part) and isinstance(part.constructor, type) else None

    @property
    def needs(self) -> str:
        """The inputs in each step."""
        of_both = self.callback is not None and {"aggregator", "scalarizer"} <= set(self.callback.options)
        return f"{NEEDS['losses']} and {NEEDS[self.kind]}" if of_both else NEEDS[self.kind]

    def parts(self, tasks: Sequence[str]) -> dict[str, torch.nn.Module]:
        """Return its aggregator and scalarizer, as far as it has them, for these tasks."""
        options = {} if self.callback is None else self.callback.options
        given = {name: options[name] for name in ("aggregator", "scalarizer") if name in options}
        return {name: instantiate(tasks, part.make(), caller=name) for name, part in given.items()}

    def rule(self, tasks: Sequence[str], **options: Any) -> ScalarizationRule | None:
        """Return its training rule, or ``None`` if it has neither an aggregator nor a scalarizer.

        Args:
            tasks: names of the tasks.
            options: other arguments of the rule, such as ``seed`` and ``dtype``.
        """
        parts = self.parts(tasks)
        if not parts:
            return None
        assert self.callback is not None
        if "optimizer" in self.callback.options:
            options["optimizer"] = self.callback.options["optimizer"].make()
        if "aggregator" not in parts:
            return ScalarizationRule(tasks, parts["scalarizer"], **options)
        of_parameters = self.kind == "parameters"
        return AggregationRule(
            tasks, parts["aggregator"], parts.get("scalarizer"), of_parameters=of_parameters, **options
        )

    # ---- facts for the documentation ---------------------------------------------------------------------------------

    @cached_property
    def _rule(self) -> ScalarizationRule | None:
        return self.rule(["a", "b", "c", "d"])

    @cached_property
    def _facts(self) -> list[Facts]:
        modules = [] if self._rule is None else [getattr(self._rule, "aggregator", None), self._rule.scalarizer]
        return [facts_of(part) for module in modules if module is not None for part in module.modules()]

    @property
    def remembers(self) -> str:
        """Its state in a checkpoint."""
        if self._formula is not None:
            return "weights, averages"
        if self.callback is None or self._rule is None:
            return _CALLBACK_FACTS.get(self._callback_name, ("", ""))[0] or "nothing"
        said = [facts.remembers for facts in self._facts if facts.remembers]
        if self._rule.scalarizer is not None and any(p.requires_grad for p in self._rule.scalarizer.parameters()):
            said.append("optimizer")
        return ", ".join(dict.fromkeys(", ".join(said).split(", "))) or "nothing"

    @property
    def costs(self) -> str:
        """The cost of a step besides the backward pass."""
        if self._rule is not None and self._rule.needs_losses_after_step:
            return "one more forward pass"
        costs = {
            "norms": "T gradients of one layer",
            "network": "T backward passes, in steps with an update",
            "representation": "T × z in memory",
            "parameters": "T passes through the trunk",
        }
        return costs.get(self.kind, "nothing")

    @property
    def weights_sum_to(self) -> str:
        """The sum of its weights as text."""
        if self._formula is not None and self.callback is not None:
            option = inspect.signature(self._formula).parameters.get("normalize")
            normalizes = option is not None and self.callback.options["rule"].options.get("normalize", option.default)
            return "T" if normalizes else "free"
        if self._rule is None:
            return _CALLBACK_FACTS.get(self._callback_name, ("", "T"))[1]
        if not self._rule.has_weights:
            return "none"
        parts = list(self.parts(self._rule.tasks).values())
        return facts_of(parts[0]).weights_sum_to if len(parts) == 1 else "free"

    @property
    def weights_may_be_negative(self) -> bool:
        """True if a weight can be negative."""
        has_weights = self._rule is not None and self._rule.has_weights
        return has_weights and any(facts.weights_may_be_negative for facts in self._facts)

    @property
    def on_ranks(self) -> str:
        """How several ranks compare with one process."""
        by_number = isinstance(self._rule, AggregationRule) and self._rule.input == "matrix"
        return "number by number" if by_number and self.kind == "representation" else "exact"

    @property
    def fewest_tasks(self) -> int:
        """The minimum number of tasks, with the options in its file."""
        return 1 if self.callback is None else max([2, *(facts.fewest_tasks for facts in self._facts)])

    @property
    def _callback_name(self) -> str:
        return "" if self.callback is None else self.callback.constructor.__name__


@cache
def read_strategies(conf: Path) -> Mapping[str, Strategy]:
    """Return the strategies in a folder of configurations by name.

    Example:
        >>> from lightning_gradnorm.experiments.cli.config import conf_dir
        >>> imtl = read_strategies(conf_dir())["imtl"]
        >>> imtl.needs
        'losses and gradients at the representation'
        >>> print(imtl.callback)
        Aggregation(IMTLG(), scalarizer=IMTLL)
    """
    main = OmegaConf.load(conf / "config.yaml")
    return {file.stem: _read(file, main) for file in sorted((conf / "balancing").glob("*.yaml"))}


def read_header(text: str) -> tuple[str, str, str]:
    r"""Return summary, source and formula from the comment at the beginning of a configuration.

    Example:
        >>> read_header("# Mine: the sum\n# (Me, 2026). Try it.\n# Formula: w_i = 1\na: 1")
        ('Mine: the sum. Try it.', 'Me, 2026', 'w_i = 1')
    """
    lines = [line for line in text.splitlines() if not line.startswith("# @package")]
    end = next((place for place, line in enumerate(lines) if not line.startswith("#")), len(lines))
    told, _, formula = "\n".join(line.lstrip("# ").rstrip() for line in lines[:end]).partition("Formula:")
    source = re.search(r"^\((.*?)\)\.?$|^\((.*?)\)\. ", told, flags=re.MULTILINE)
    if source is not None:
        told = f"{told[: source.start()].rstrip()}. {told[source.end() :].lstrip()}"
    return " ".join(told.split()), (source[1] or source[2]) if source else "", " ".join(formula.split())


def _read(file: Path, main: Any) -> Strategy:
    content: Any = OmegaConf.load(file)
    made = {}
    for entry in content.pop("defaults", []):
        name, _, place = str(entry).partition("@")
        if name.startswith("/schema/"):
            made[place.removeprefix("_here_")] = SCHEMAS[name.removeprefix("/schema/")]
    root: Any = OmegaConf.to_container(OmegaConf.merge(main, {"balancing": None}), resolve=False)
    options: Any = OmegaConf.to_container(OmegaConf.create(root | {"balancing": content}), resolve=False)
    values = OmegaConf.to_container(OmegaConf.create(options).balancing, resolve=True)
    assert isinstance(values, dict)
    callback = _part(values, "", made) if made or "_target_" in values else None
    return Strategy(file.stem, *read_header(file.read_text(encoding="utf-8")), callback)


def _part(values: Mapping[Any, Any], place: str, made: Mapping[str, Constructor]) -> Part:
    constructor = get_object(values["_target_"]) if "_target_" in values else made[place]
    inside = f"{place}." if place else ""
    names = [
        at.removeprefix(inside) for at in made if at and at.startswith(inside) and "." not in at.removeprefix(inside)
    ]
    options: dict[str, Any] = {}
    for name in [*names, *(str(key) for key in values if key not in names and not str(key).startswith("_"))]:
        value = values.get(name, {} if name in names else None)
        if name in names or (isinstance(value, dict) and "_target_" in value):
            options[name] = _part(value, f"{inside}{name}", made)
        elif value is not None:
            options[name] = ... if value == MISSING else value
    given = not set(made_for_tasks(constructor)) <= set(options)
    return Part(constructor, options, bool(values.get("_partial_", given and "_target_" not in values)))
