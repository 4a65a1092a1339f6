"""The plan of a measurement, and its page."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from pages import write_page

from benchmarking.running import Setting
from benchmarking.ways import EQUAL, WAYS, Way

Case = tuple[str, int]
Result = TypeVar("Result")

SUBTITLES = {
    "against_tasks": "against the number of tasks",
    "aggregation": "aggregations",
    "narrow": "a narrow MLP",
    "networks": "larger networks",
    "pinn": "a physics-informed network",
}
"""Readable endings of a page's title. Other endings stay as they are in the file's name."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        group: group of the ways.
        names: names of the ways to compare with equal weights.
        cases: networks with their numbers of tasks.
        left_out: ways that cannot run here, with the reason.
    """

    group: str
    names: Sequence[str]
    cases: Sequence[Case]
    rounds: int
    setting: Setting
    output: Path
    name: str
    left_out: Mapping[str, str]

    def way(self, name: str) -> Way:
        return WAYS[self.group][name]

    @property
    def all_names(self) -> list[str]:
        return [EQUAL, *self.names]

    def interleaved(self, names: Sequence[str]) -> Iterator[str]:
        """Yield every name once per round, in random order."""
        for _ in range(self.rounds):
            yield from random.sample(list(names), len(names))

    def write(self, title: str, described: str, parts: Sequence[str]) -> Path:
        """Write the page. The part of its name after ``step_time`` or ``peak_memory`` is the subtitle."""
        words = self.name.split("_", 2)
        if len(words) == 3:
            title += f": {SUBTITLES.get(words[2], words[2].replace('_', ' '))}"
        setting = self.setting
        if setting.device == "cuda":
            where = torch.cuda.get_device_name()
        else:
            where = f"CPU, {setting.threads} thread{'s' if setting.threads > 1 else ''}"
        said = [where, f"{self.rounds} round{'s' if self.rounds > 1 else ''}"]
        said += [setting.precision] if setting.precision != "fp32" else []
        said += ["trunk and heads compiled"] if setting.compiled else []
        said += [f"batches of {setting.batch_size}"] if setting.batch_size else []
        clock = " Processor time of the process." if setting.clock == "processor" else ""
        notes = [f"Left out: {', '.join(f'{name} ({why})' for name, why in self.left_out.items())}."]
        page = self.output / f"{self.name}.md"
        everything = [*parts, *(notes if self.left_out else [])]
        return write_page(page, title, f". {described}{clock}", everything, where=", ".join(said))


class Failures:
    """Records failures of other packages' ways. Errors in ours are raised."""

    def __init__(self) -> None:
        self.reasons: dict[tuple[str, Case], str] = {}

    def attempt(self, plan: Plan, name: str, case: Case, action: Callable[[], Result]) -> Result | None:
        """Return the result of the action, or ``None`` if it failed now or before."""
        if (name, case) in self.reasons:
            return None
        try:
            return action()
        except Exception as error:
            if plan.way(name).is_ours:
                raise
            lines = [line for line in str(error).splitlines() if line.strip()]
            self.reasons[name, case] = f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
            return None

    def sentences(self) -> list[str]:
        """Return the list of failures for the page, if there are any."""
        lines = [f"- {name} on {kind}, T = {tasks}: {why}" for (name, (kind, tasks)), why in self.reasons.items()]
        return ["\n".join(["What fails:", "", *lines])] if lines else []
