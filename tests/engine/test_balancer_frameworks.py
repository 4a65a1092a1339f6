"""`Balancer` in Fabric, Accelerate and Hugging Face's Trainer gives the numbers of a plain loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from loops import Network, distance, gradnorm_rule, parameter_distance, train
from models import TASKS, Batch, network_sgd, vector_batches
from torch import Tensor, nn
from torch.nn import functional as F
from torchjd import aggregation as A

from lightning_gradnorm import Balancer
from lightning_gradnorm.strategies import AggregationRule, GradNormRule

STEPS = 12
accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")


def assert_as_in_a_plain_loop(
    model: Network, weights: list[dict[str, float]], batches: list[Batch], accumulate: int = 1, rule: Any = None
) -> None:
    plain = Network()
    expected, _ = train(plain, rule or gradnorm_rule(), batches, accumulate=accumulate)
    assert distance(weights, expected) <= 1e-9
    assert parameter_distance(model, plain) <= 1e-9
    assert max(abs(weight - 1) for weight in weights[-1].values()) > 0.1


# ---- Fabric ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _double_outputs() -> Iterator[None]:
    """Fabric turns what a module returns into the default precision, in which the losses would be rounded."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.each_value_once
@pytest.mark.usefixtures("_double_outputs")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("with_heads", [True, False])
@pytest.mark.parametrize("given", ["raw", "wrapped"])
def test_fabric(given: str, with_heads: bool, accumulate: int) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    raw, batches, weights = Network(), vector_batches(3, STEPS * accumulate), []
    model, optimizer = fabric.setup(raw, network_sgd(raw.parameters()))
    heads = raw.heads() if with_heads else None
    with Balancer(raw if given == "raw" else model, gradnorm_rule(), heads=heads) as balancer:
        for index, batch in enumerate(batches):
            last = (index + 1) % accumulate == 0
            with fabric.no_backward_sync(model, enabled=not last):
                balancer.backward(model(batch), backward=lambda loss: fabric.backward(loss / accumulate))
            if last:
                optimizer.step()
                balancer.step()
                optimizer.zero_grad()
                weights.append(balancer.weights)
    assert_as_in_a_plain_loop(raw, weights, batches, accumulate)


def test_the_wrapped_model_and_the_raw_one_are_one_model() -> None:
    fabric, raw = Fabric(accelerator="cpu", devices=1), Network()
    with (
        Balancer(raw, gradnorm_rule()),
        pytest.raises(ValueError, match="Network already has a Balancer, with GradNormRule"),
    ):
        Balancer(fabric.setup(raw), gradnorm_rule())


# ---- Accelerate ------------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_accelerate() -> Iterator[None]:
    yield
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


@pytest.mark.each_value_once
@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("with_heads", [True, False])
@pytest.mark.parametrize("given", ["raw", "prepared"])
def test_accelerate(given: str, with_heads: bool, accumulate: int) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    raw, batches, weights = Network(), vector_batches(3, STEPS * accumulate), []
    model, optimizer = accelerator.prepare(raw, network_sgd(raw.parameters()))
    heads = raw.heads() if with_heads else None
    with Balancer(raw if given == "raw" else model, gradnorm_rule(), heads=heads) as balancer:
        for batch in batches:
            with accelerator.accumulate(model):
                balancer.backward(model(batch), backward=accelerator.backward)
                optimizer.step()
                if accelerator.sync_gradients:
                    balancer.step(skipped=accelerator.optimizer_step_was_skipped)
                    weights.append(balancer.weights)
                optimizer.zero_grad()
    assert_as_in_a_plain_loop(raw, weights, batches, accumulate)


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


class Balanced(transformers.Trainer):  # type: ignore[misc,name-defined]
    """The recipe of the documentation."""

    balancer: Balancer

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        losses = model(inputs["batch"])
        loss = self.balancer.prepare_loss(losses)
        return (loss, losses) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None


class Steps(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
    def __init__(self, balancer: Balancer) -> None:
        self.balancer = balancer
        self.weights: list[dict[str, float]] = []

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.balancer.step()
        self.weights.append(self.balancer.weights)


def _one(batches: list[Any]) -> Any:
    return {"batch": batches[0]}


def _huggingface(
    folder: Path, batches: list[Batch], rule: Any, *, accumulate: int = 1, heads: bool = True, **options: Any
) -> tuple[Network, list[dict[str, float]], Any]:
    model = Network()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
        logging_strategy="no",
        **options,
    )
    with Balancer(model, rule, heads=model.heads() if heads else None) as balancer:
        steps = Steps(balancer)
        trainer = Balanced(
            model,
            arguments,
            data_collator=_one,
            train_dataset=batches,
            eval_dataset=batches[:2],
            callbacks=[steps],
            optimizers=(network_sgd(model.parameters()), None),
        )
        trainer.balancer = balancer
        trainer._get_train_sampler = lambda *args: None  # the batches in their order
        trainer.train()
    return model, steps.weights, trainer


@pytest.mark.each_value_once
@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("with_heads", [True, False])
def test_hugging_face(with_heads: bool, accumulate: int, tmp_path: Path) -> None:
    batches = vector_batches(3, STEPS * accumulate)
    model, weights, _ = _huggingface(tmp_path, batches, gradnorm_rule(), accumulate=accumulate, heads=with_heads)
    assert_as_in_a_plain_loop(model, weights, batches, accumulate)


@pytest.mark.usefixtures("_fresh_accelerate")
def test_hugging_face_evaluates_between_the_steps(tmp_path: Path) -> None:
    batches = vector_batches(3, STEPS)
    options = {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 1}
    model, weights, trainer = _huggingface(tmp_path, batches, gradnorm_rule(), **options)
    assert_as_in_a_plain_loop(model, weights, batches)
    losses = [one["eval_loss"] for one in trainer.state.log_history if "eval_loss" in one]
    assert len(losses) == 3


class Reader(nn.Module):
    """A tiny BERT with two heads, whose forward takes keywords as those of the transformers library do."""

    accepts_loss_kwargs = False

    def __init__(self) -> None:
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.kind_head, self.size_head = nn.Linear(8, 3), nn.Linear(8, 1)
        self.double()

    def forward(self, input_ids: Tensor, kind: Tensor, size: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        z = self.bert(input_ids=input_ids).last_hidden_state[:, 0]
        said = self.size_head(z)[:, 0]
        return {"kind": F.cross_entropy(self.kind_head(z), kind), "size": 5 * F.mse_loss(said, size)}


class Reads(Balanced):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return self.balancer.prepare_loss(model(**inputs))


@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.parametrize("heads", [{"kind": "kind_head", "size": "size_head"}, None])
def test_a_tiny_bert_with_two_heads(heads: Any, tmp_path: Path) -> None:
    tasks, layer = ["kind", "size"], "bert.encoder.layer.1.output.dense"
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "input_ids": torch.randint(20, (6,), generator=generator),
            "kind": torch.randint(3, (), generator=generator),
            "size": torch.randn((), generator=generator, dtype=torch.float64),
        }
        for _ in range(STEPS * 2 * 4)
    ]
    model, plain = Reader(), Reader()
    plain.load_state_dict(model.state_dict())
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    with Balancer(model, GradNormRule(tasks), shared_layer=layer, heads=heads) as balancer:
        steps = Steps(balancer)
        sgd = (network_sgd(model.parameters()), None)
        trainer = Reads(model, arguments, train_dataset=rows, callbacks=[steps], optimizers=sgd)
        trainer.balancer = balancer
        trainer._get_train_sampler = lambda *args: None
        trainer.train()
    batches = [{k: torch.stack([row[k] for row in rows[i : i + 4]]) for k in rows[0]} for i in range(0, len(rows), 4)]
    optimizer, weights = network_sgd(plain.parameters()), []
    with Balancer(plain, GradNormRule(tasks), shared_layer=layer) as balancer:
        for index, batch in enumerate(batches):
            balancer.backward(plain(**batch), backward=lambda loss: (loss / 2).backward())
            if index % 2:
                optimizer.step()
                balancer.step()
                optimizer.zero_grad()
                weights.append(balancer.weights)
    assert distance(steps.weights, weights) <= 1e-9
    assert parameter_distance(model, plain) <= 1e-9
    assert abs(weights[-1]["kind"] - 1) > 0.02


@pytest.mark.usefixtures("_fresh_accelerate")
def test_an_aggregation_in_hugging_face(tmp_path: Path) -> None:
    batches = vector_batches(3, STEPS * 2)
    rule = AggregationRule(TASKS[:3], A.UPGrad())
    model, weights, _ = _huggingface(tmp_path, batches, rule, accumulate=2)
    assert_as_in_a_plain_loop(model, weights, batches, 2, rule=AggregationRule(TASKS[:3], A.UPGrad()))
