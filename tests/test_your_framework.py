"""Each recipe of docs/your_framework.md runs as printed and gives the weights of a plain loop."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import textbook
import torch
import torch.distributed as dist
from loops import Network, distance, parameter_distance, train
from models import TASKS, Batch, network_sgd, vector_batches
from ranks import in_processes
from third_party.projects import PROJECTS
from torch.utils.data import DataLoader

from lightning_gradnorm import Balancer
from lightning_gradnorm.strategies import GradNormRule

PAGE = (Path(__file__).parents[1] / "docs" / "your_framework.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
BATCHES = vector_batches(2, 16, size=8)
NAMES = TASKS[:2]
GALLERY = "Models you did not write"


def compute_losses(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    return model(batch)


def run(title: str, *, batches: list[Batch] = BATCHES, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """Run a recipe on a tiny model; return its names."""
    model = Network(2).to(dtype)
    names: dict[str, Any] = {
        "torch": torch,
        "Balancer": Balancer,
        "GradNormRule": GradNormRule,
        "compute_losses": compute_losses,
        "model": model,
        "network": model,
        "optimizer": network_sgd(model.parameters()),
        "loader": [{name: value.to(dtype) for name, value in batch.items()} for batch in batches],
        **more,
    }
    exec(compile(RECIPES[title], f"your_framework.md: {title}", "exec"), names)
    return names


def assert_as_in_a_plain_loop(names: Any, *, accumulate: int = 1, bound: float = 1e-9) -> None:
    network = names["network"]
    plain = Network(2).to(network.encoder[0].weight.dtype)
    batches = [{name: value.to(plain.encoder[0].weight) for name, value in batch.items()} for batch in BATCHES]
    expected, _ = train(plain, GradNormRule(NAMES, alpha=1.5), batches, accumulate=accumulate)
    assert distance([names["balancer"].weights], expected[-1:]) <= bound
    assert parameter_distance(network, plain) <= bound
    assert abs(expected[-1]["seg"] - 1) > 0.005


@pytest.fixture
def _fresh_accelerate() -> Iterator[None]:
    accelerate = pytest.importorskip("accelerate")
    yield
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def test_every_section_has_a_recipe_of_at_most_twenty_lines() -> None:
    assert list(RECIPES) == re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    assert len(RECIPES) == 10
    assert max(len(code.splitlines()) for code in RECIPES.values()) <= 20


def test_plain_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("Plain PyTorch")
    assert_as_in_a_plain_loop(names)
    assert capsys.readouterr().out == f"{names['balancer']}\n{names['balancer'].weights}\n"
    assert "W = encoder.2.weight" in str(names["balancer"])
    Balancer(names["model"], GradNormRule(NAMES)).close()  # it was closed


def test_accumulation() -> None:
    assert_as_in_a_plain_loop(run("Accumulate gradients"), accumulate=2)


def test_a_closure() -> None:
    model = Network(2)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")
    names = run("LBFGS, SAM and other optimizers with a closure", model=model, optimizer=optimizer)
    assert names["balancer"].rule.steps == len(BATCHES)

    twin = Network(2)
    made = torch.optim.LBFGS(twin.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")
    W = [twin.encoder[2].weight]
    expected = textbook.train(twin, twin.forward_for_textbook, BATCHES, W, made, by_closure=True)
    assert distance([names["balancer"].weights], expected.weights[-1:]) <= 1e-9
    assert parameter_distance(model, twin) <= 1e-8


def test_a_grad_scaler() -> None:
    names = run("Mixed precision with a GradScaler", device="cpu", dtype=torch.float32)
    assert_as_in_a_plain_loop(names, bound=0.01)
    assert not names["scaler"]._per_optimizer_states  # it was updated


def test_ddp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        share = [{name: value.chunk(2)[rank] for name, value in batch.items()} for batch in BATCHES]
        names = run("Several processes with DDP", batches=share)
        torch.save(
            {"weights": names["balancer"].weights, "network": names["model"].state_dict()}, tmp_path / f"{rank}.pt"
        )
        dist.barrier()
        dist.destroy_process_group()

    in_processes(work)
    for rank in range(2):
        told = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        network = Network(2)
        network.load_state_dict(told["network"])

        class Told:
            weights = told["weights"]

        assert_as_in_a_plain_loop({"network": network, "balancer": Told})


def test_fabric() -> None:
    assert_as_in_a_plain_loop(run("Fabric", dtype=torch.float32), bound=1e-6)


@pytest.mark.usefixtures("_fresh_accelerate")
def test_accelerate() -> None:
    loader = DataLoader(BATCHES, batch_size=None)  # type: ignore[arg-type]
    assert_as_in_a_plain_loop(run("Accelerate", loader=loader), accumulate=2)


@pytest.mark.usefixtures("_fresh_accelerate")
def test_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")

    def create_optimizer(trainer: Any, *_: Any) -> torch.optim.Optimizer:
        trainer.optimizer = network_sgd(trainer.model.parameters())
        return trainer.optimizer

    monkeypatch.setattr(transformers.Trainer, "create_optimizer", create_optimizer)
    monkeypatch.setattr(transformers.Trainer, "_get_train_sampler", lambda *_: None)  # the rows in their order
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
    )
    rows = [{name: value[row] for name, value in batch.items()} for batch in BATCHES for row in range(8)]
    names = run("Hugging Face Trainer", arguments=arguments, dataset=rows)
    assert_as_in_a_plain_loop(names)
    assert names["trainer"].state.global_step == len(BATCHES)


def test_the_lines_for_third_party_models_match_those_in_make_test_third_party() -> None:
    lines: list[dict[str, Any]] = []
    exec(RECIPES[GALLERY], {"GradNorm": lambda tasks, **options: lines.append({"tasks": tasks, **options})})
    same_line = ("BERT with LoRA", "SCVI, adversarial")
    assert lines == [make().gradnorm for name, make in PROJECTS.items() if name not in same_line]


@pytest.mark.parametrize("name", PROJECTS)
def test_the_layers_that_the_page_lists_match_those_that_make_test_third_party_finds(name: str) -> None:
    (row,) = re.findall(rf"^\| {name.partition(',')[0]} \| `.*", PAGE, re.MULTILINE)
    W, heads = re.findall(r"W = (\S+) .*, heads: (.*), losses:", PROJECTS[name]().found)[0]
    modules = [head.partition(" → ")[2] for head in heads.split(", ") if head != "none"]
    assert f"| `{W}` |" in row
    assert ("none:" in row) != bool(modules)
    assert all(f"`{module}`" in row for module in modules)


def test_save_and_resume() -> None:
    names = run("Plain PyTorch")
    with Balancer(names["model"], GradNormRule(NAMES, alpha=1.5)) as balancer:
        balancer.load_state_dict(names["balancer"].state_dict())
        again = run("Save and resume", model=names["model"], balancer=balancer)
        assert balancer.weights == names["balancer"].weights
        assert again["checkpoint"].keys() == {"model", "balancer"}
