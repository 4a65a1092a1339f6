"""The share of steps in which losses conflict, on networks without a trunk: against brute force, and across a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from any_network import NETWORKS, AnyNetwork, Batch, HeatEquation
from by_hand import flat
from harness import Batches

from lightning_gradnorm import GradientNormMonitor

STEPS = 8


def cosines_by_brute_force(
    network: type[AnyNetwork], batches: list[Batch], every: int = 1
) -> list[dict[tuple[str, str], float]]:
    """The cosines of each pair in each measured step, on all parameters that two losses have reached so far."""
    model, found = network(), []
    parameters, optimizer = list(model.parameters()), model.configure_optimizers()
    reached: dict[str, set[int]] = {}
    for number, batch in enumerate(batches):
        losses, total = model(batch)
        if number % every == 0:
            rows = {
                t: torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for t, x in losses.items()
            }
            for task, row in rows.items():
                reached.setdefault(task, set()).update(i for i, g in enumerate(row) if g is not None)
            shared = [i for i in range(len(parameters)) if sum(i in of_task for of_task in reached.values()) >= 2]
            like = [parameters[i] for i in shared]
            J = {task: flat([row[i] for i in shared], like) for task, row in rows.items()} if shared else {}
            tasks = [task for task in network.tasks if task in J and J[task].any()]
            pairs = [(one, other) for k, one in enumerate(tasks) for other in tasks[k + 1 :]]
            found.append(
                {(one, other): float(torch.cosine_similarity(J[one], J[other], dim=0)) for one, other in pairs}
            )
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return found


def shares(steps: list[dict[tuple[str, str], float]]) -> dict[tuple[str, str], float]:
    """The share of the steps with both losses in which the cosine is below 0."""
    pairs = list(dict.fromkeys(pair for step in steps for pair in step))
    of_pair = {pair: [step[pair] for step in steps if pair in step] for pair in pairs}
    return {pair: sum(one < 0 for one in found) / len(found) for pair, found in of_pair.items()}


@pytest.mark.each_value_once
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("missing", [(), (0, 1, 5)], ids=["all there", "absent at times"])
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_without_a_trunk_they_agree_with_brute_force(
    network: type[AnyNetwork], missing: tuple[int, ...], every: int, quiet_trainer: Any
) -> None:
    batches = network.batches(
        STEPS, lacks=lambda i: network.tasks[1] if i in missing and len(network.tasks) > 2 else None
    )
    monitor, model = GradientNormMonitor(list(network.tasks), every_n_steps=every), network()
    quiet_trainer(callbacks=[monitor]).fit(model, Batches(batches))
    expected = shares(cosines_by_brute_force(network, batches, every))
    assert monitor.conflicts == expected
    logged = model.trainer.callback_metrics
    assert {pair: float(logged[f"monitor/conflict/{pair[0]}/{pair[1]}"]) for pair in expected} == pytest.approx(
        expected
    )


def test_some_conflict_in_some_steps() -> None:
    """Otherwise a monitor that reports 0 or 1 at random would pass the test above."""
    of_all = [
        share for n in NETWORKS.values() for share in shares(cosines_by_brute_force(n, n.batches(STEPS))).values()
    ]
    assert 0 in of_all
    assert any(0 < share < 1 for share in of_all)


def test_they_continue_after_a_resume(tmp_path: Path, quiet_trainer: Any) -> None:
    batches = HeatEquation.batches(STEPS)
    whole, half, rest = (GradientNormMonitor(list(HeatEquation.tasks), every_n_steps=1) for _ in range(3))
    quiet_trainer(callbacks=[whole]).fit(HeatEquation(), Batches(batches))
    trainer = quiet_trainer(callbacks=[half])
    trainer.fit(HeatEquation(), Batches(batches[:4]))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    quiet_trainer(callbacks=[rest], max_epochs=2).fit(
        HeatEquation(), Batches(batches[4:]), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    assert whole.conflicts
    assert rest.conflicts == pytest.approx(whole.conflicts)
