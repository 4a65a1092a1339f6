"""The same numbers on a GPU: `pytest -m gpu`. Each test also runs on the CPU, which shows that the test itself works."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import textbook
import torch
from devices import CUDA, MODES, NAMES, STEPS, MakeTrainer, T, fit, make, on_each_device
from harness import Batches, Overflows, Recorder, Shares, assert_agrees, state_by_part
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from models import (
    Automatic,
    Convolutional,
    as_inputs_and_targets,
    image_batches,
    network_sgd,
    vector_batches,
)
from torch import Tensor, nn
from torchjd import aggregation as A
from torchjd import scalarization as S

from lightning_gradnorm import Aggregation, FixedWeights, GradNorm, Scalarization
from lightning_gradnorm.strategies import DBMTL, LogSum

# ---- against the textbook --------------------------------------------------------------------------------------------


CASES = [*MODES, *(f"{mode} with heads" for mode in MODES), "module"]


def learn_from_textbook(mode: str) -> tuple[Automatic, textbook.Trajectory]:
    """Double backward on the CPU, in float64."""
    is_convolutional = mode.startswith("batch-norm")
    twin = (Convolutional if is_convolutional else Automatic)(T)
    batches = (image_batches if is_convolutional else vector_batches)(T, STEPS)
    norm_of = "activation" if mode.startswith("activation") else "weight"
    optimizer = network_sgd(twin.parameters())
    shared = twin.shared_parameters()
    return twin, textbook.train(twin, twin.forward_for_textbook, batches, shared, optimizer, norm_of=norm_of)


def closest_call(trajectory: textbook.Trajectory, alpha: float = 1.5) -> float:
    """How near a gradient norm came to its target, relative to it: the weights' gradient changes its sign there."""
    distances = []
    for norms, rates in zip(trajectory.grad_norms, trajectory.rates, strict=True):
        mean = sum(norms.values()) / len(norms)
        distances += [abs(norms[task] / (mean * rates[task] ** alpha) - 1) for task in norms]
    return min(distances)


@on_each_device("mode", CASES, quick=["automatic with heads", "batch-norm with heads", "activation", "module"])
def test_double_precision_agrees_with_the_textbook(mode: str, make_trainer: MakeTrainer) -> None:
    twin, trajectory = learn_from_textbook(mode)
    assert max(abs(weight - 1) for weight in trajectory.weights[-1].values()) > 0.1, "it would prove nothing"
    model, gradnorm, batches = make(mode)
    recorder = fit(make_trainer, model, gradnorm, batches)
    assert_agrees(recorder, model, trajectory, twin, tolerance=1e-8)


@on_each_device("mode", CASES, quick=["automatic with heads", "batch-norm"])
def test_single_precision_agrees_with_the_textbook(mode: str, make_trainer: MakeTrainer) -> None:
    twin, trajectory = learn_from_textbook(mode)
    assert closest_call(trajectory) > 1e-4, "rounding would decide in which direction a weight moves"
    model, gradnorm, batches = make(mode)
    recorder = fit(make_trainer, model.float(), gradnorm, batches)
    assert_agrees(recorder, model, trajectory, twin, tolerance=1e-3)


def test_fixed_weights_multiply_the_gradients(make_trainer: MakeTrainer) -> None:
    weights = {"seg": 0.5, "depth": 2.0, "normal": 3.0}
    model, twin = Automatic(T), Automatic(T)
    batches = vector_batches(T, 4)
    make_trainer(callbacks=[FixedWeights(weights)]).fit(model, Batches(batches))

    optimizer = network_sgd(twin.parameters())
    for batch in batches:
        optimizer.zero_grad()
        torch.stack([weights[task] * loss for task, loss in twin.task_losses(batch).items()]).sum().backward()
        optimizer.step()
    for name, value in model.cpu().state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=0, atol=1e-10)


STRATEGIES: dict[str, Callable[[], Scalarization]] = {
    "UW": lambda: Scalarization(S.UW, NAMES),
    "FAMO": lambda: Scalarization(S.FAMO, NAMES),
    "DWA": lambda: Scalarization(S.DWA(), NAMES),
    "GeometricMean": lambda: Scalarization(S.GeometricMean(), NAMES),
    "IMTLG of IMTLL": lambda: Aggregation(A.IMTLG(), NAMES, scalarizer=S.IMTLL),
    "MGDA": lambda: Aggregation(A.MGDA(), NAMES),
    "GradVac": lambda: Aggregation(A.GradVac(), NAMES),
    "ConFIG": lambda: Aggregation(A.ConFIG(), NAMES),
    "TrimmedMean": lambda: Aggregation(A.TrimmedMean(1), NAMES),
    "AlignedMTL at parameters": lambda: Aggregation(A.AlignedMTL(), NAMES, at="parameters"),
    "DBMTL at parameters": lambda: Aggregation(DBMTL(), NAMES, at="parameters", scalarizer=LogSum()),
}


@on_each_device("name", list(STRATEGIES), quick=["UW", "IMTLG of IMTLL", "DBMTL at parameters"])
@pytest.mark.parametrize("with_heads", [False, True], ids=["no-heads", "heads"])
def test_every_kind_of_strategy_trains_as_on_a_cpu(
    name: str, with_heads: bool, make_trainer: MakeTrainer, quiet_trainer: MakeTrainer
) -> None:
    ended = []
    for trainer in (make_trainer, quiet_trainer):
        model, balancing = Automatic(T), STRATEGIES[name]()
        balancing.heads = model.heads() if with_heads else None
        trainer(callbacks=[balancing], max_epochs=2).fit(model, Batches(vector_batches(T, STEPS)))
        ended.append((model.cpu().state_dict(), balancing.weights, balancing.state_dict()["fallbacks"]))
    (found, weights, fallbacks), (expected, expected_weights, _) = ended
    assert fallbacks == 0
    assert weights == pytest.approx(expected_weights, rel=1e-8)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-8)


# ---- where the weights are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["automatic with heads", "module"])
def test_the_weights_are_on_the_device_and_shown_as_floats(mode: str, make_trainer: MakeTrainer, device: str) -> None:
    model, gradnorm, batches = make(mode)
    places: set[str] = set()

    class Place(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            state = gradnorm.state_dict()
            places.update(str(state[key].device.type) for key in ("weights", "weights_mean"))

    fit(make_trainer, model, gradnorm, batches[:3], callbacks=[Place()])
    assert places == {device}
    for shown in (gradnorm.weights, gradnorm.mean_weights):
        assert [type(value) for value in shown.values()] == [float] * T
        assert sum(shown.values()) == pytest.approx(T)


# ---- mixed precision -------------------------------------------------------------------------------------------------

LONG = 50
MIXED = ["automatic", "automatic with heads", "module"]


def half_precision(device: str, scale: float) -> dict[str, Any]:
    scaler = torch.amp.GradScaler(device, init_scale=scale)
    return {"plugins": [MixedPrecision("16-mixed", device, scaler)]}


def table(recorder: Recorder) -> Tensor:
    """Weights by step and task."""
    return torch.tensor([list(weights.values()) for weights in recorder.weights])


def fit_long(trainer: MakeTrainer, mode: str, **options: Any) -> Tensor:
    model, gradnorm, _ = make(mode)
    gradnorm.optimizer = partial(torch.optim.SGD, lr=0.02)  # Adam would hide norms that are too large by a factor
    batches: list[Any] = vector_batches(T, LONG)
    fed = as_inputs_and_targets(batches) if mode == "module" else batches
    return table(fit(trainer, model.float(), gradnorm, fed, **options))


@on_each_device("mode", MIXED, quick=["automatic with heads"])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_follows_single_precision(
    mode: str, precision: str, make_trainer: MakeTrainer, device: str
) -> None:
    single = fit_long(make_trainer, mode)
    assert (single[-1] - 1).abs().max() > 0.1
    options = {"precision": precision} if precision == "bf16-mixed" else half_precision(device, scale=2.0**12)
    torch.testing.assert_close(fit_long(make_trainer, mode, **options), single, rtol=0.01, atol=0)


@on_each_device("mode", MIXED, quick=["module"])
def test_a_forced_overflow_is_no_make_weight_optimizer(mode: str, make_trainer: MakeTrainer, device: str) -> None:
    skipped = {3, 17, 18}
    weights = fit_long(make_trainer, mode, callbacks=[Overflows(skipped)], **half_precision(device, scale=2.0**12))
    stood_still = (weights[1:] == weights[:-1]).all(dim=1)
    assert {step for step in range(1, LONG) if stood_still[step - 1]} == skipped


def test_the_weights_move_in_the_same_steps_as_the_network(make_trainer: MakeTrainer, device: str) -> None:
    """A scale that is far too large, as the Trainer's own scaler may have it at first, is halved step by step."""
    seen: list[tuple[Tensor, list[float]]] = []
    model, gradnorm, batches = make("automatic with heads")

    class Note(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            seen.append(
                (pl_module.get_parameter("encoder.0.weight").detach().cpu().clone(), list(gradnorm.weights.values()))
            )

    fit(make_trainer, model.float(), gradnorm, batches, callbacks=[Note()], **half_precision(device, scale=2.0**22))
    network_moved = [not torch.equal(one[0], other[0]) for one, other in itertools.pairwise(seen)]
    weights_moved = [one[1] != other[1] for one, other in itertools.pairwise(seen)]
    assert {False, True} == set(network_moved)
    assert weights_moved == network_moved


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)], indirect=True)
def test_the_trainers_own_scaler_is_used(make_trainer: MakeTrainer) -> None:
    weights = fit_long(make_trainer, "automatic with heads", precision="16-mixed")
    assert torch.isfinite(weights).all()
    assert (weights[-1] - 1).abs().max() > 0.1


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def compiled(model: Automatic, what: str, backend: str) -> Any:
    """The model with that part of it compiled; its parameters stay where they are."""
    names = ["encoder"] * ("encoder" in what) + list(model.heads().values()) * ("heads" in what)
    for name in names:
        setattr(model, name, torch.compile(getattr(model, name), backend=backend))
    return torch.compile(model, backend=backend) if what == "module" else model


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # torch.compile's own
    "ignore:.*should not be instantiated",
    "ignore:.*torch.jit.* is deprecated",
)
@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("cpu", "aot_eager"),
        pytest.param("cpu", "inductor", marks=pytest.mark.slow),
        pytest.param("cuda", "inductor", marks=CUDA),
    ],
    indirect=["device"],
)
@pytest.mark.parametrize("kind", [Automatic, pytest.param(Convolutional, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["heads", "encoder", "encoder and heads", "module"])
def test_compiled_parts_train_as_plain_ones(
    what: str, kind: type[Automatic], backend: str, make_trainer: MakeTrainer
) -> None:
    batches = (image_batches if kind is Convolutional else vector_batches)(T, STEPS)
    plain, model = kind(T).float(), kind(T).float()
    expected = fit(make_trainer, plain, GradNorm(NAMES, heads=plain.heads()), batches)
    gradnorm = GradNorm(NAMES, heads=model.heads())
    torch._dynamo.reset()
    try:
        found = fit(make_trainer, compiled(model, what, backend), gradnorm, batches)
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(table(found), table(expected), rtol=0, atol=1e-4)
    for mine, other in zip(model.cpu().parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)


# ---- several devices -------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group() -> Iterator[None]:
    """Ends the process group that a strategy leaves behind, and forgets which rank this process was."""
    with mock.patch.dict(os.environ):
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@on_each_device(
    "mode",
    ["automatic with heads", "automatic", "manual with heads", "module"],
    quick=["automatic with heads", "module"],
)
@pytest.mark.usefixtures("process_group")
def test_ddp_on_one_device_agrees_with_the_textbook(mode: str, make_trainer: MakeTrainer, device: str) -> None:
    twin, trajectory = learn_from_textbook(mode)
    model, gradnorm, batches = make(mode)
    recorder = fit(make_trainer, model, gradnorm, batches, strategy="ddp", devices=1)
    assert torch.distributed.get_backend() == ("nccl" if device == "cuda" else "gloo")
    assert_agrees(recorder, model, trajectory, twin, tolerance=1e-8)


def two_devices(kind: type[Automatic], heads: bool, trainer: MakeTrainer, **options: Any) -> dict[str, Tensor]:
    """What rank 0 of two spawned processes ends with: the network, and the weights as it logged them."""
    model = kind(T)
    batches = image_batches(T, STEPS) if kind is Convolutional else vector_batches(T, STEPS)
    if kind is Convolutional:  # three images do not part evenly
        batches = [
            {name: torch.cat([value, value.flip(0) + 0.1])[:4] for name, value in batch.items()} for batch in batches
        ]
    gradnorm = GradNorm(NAMES, heads=model.heads() if heads else None)
    run = trainer(callbacks=[gradnorm], use_distributed_sampler=False, **options)
    run.fit(model, datamodule=Shares(batches))
    logged = {name: value.cpu() for name, value in run.callback_metrics.items() if "gradnorm/weight" in name}
    return {**state_by_part(model.cpu()), **logged}


@on_each_device("layers", ["linear", "SyncBatchNorm"], quick=[])
@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
def test_two_devices_agree_with_one(layers: str, heads: bool, make_trainer: MakeTrainer, device: str) -> None:
    kind = Convolutional if layers == "SyncBatchNorm" else Automatic
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices; there is {torch.cuda.device_count()}")
    if device == "cpu" and kind is Convolutional:
        pytest.skip("torch has SyncBatchNorm on a GPU only")
    one = two_devices(kind, heads, make_trainer)
    two = two_devices(kind, heads, make_trainer, devices=2, strategy="ddp_spawn", sync_batchnorm=kind is Convolutional)
    assert max(float(abs(one[f"gradnorm/weight/{task}"] - 1)) for task in NAMES) > 0.05
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-8)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    "ignore:.*pre-optimization state.*",  # a checkpoint in a step of a module with manual optimization is on purpose
    "ignore:.*manual optimization.*",
    "ignore:Be aware that when using .ckpt_path., callbacks used to create the checkpoint",
)
@pytest.mark.parametrize("mode", ["automatic with heads", "manual", "module"])
@pytest.mark.parametrize(
    ("written_on", "resumed_on"),
    [
        ("cpu", "cpu"),
        pytest.param("cuda", "cuda", marks=CUDA),
        pytest.param("cpu", "cuda", marks=CUDA),
        pytest.param("cuda", "cpu", marks=CUDA),
    ],
)
def test_a_run_is_resumed_on_either_device(
    written_on: str, resumed_on: str, mode: str, quiet_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def train(device: str, **options: Any) -> tuple[nn.Module, Recorder]:
        model, gradnorm, batches = make(mode)
        trainer = partial(quiet_trainer, accelerator="gpu" if device == "cuda" else "cpu", max_epochs=2)
        return model, fit(trainer, model, gradnorm, batches[:6], **options)

    save = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    network, whole = train(written_on, callbacks=[save], enable_checkpointing=True)
    tolerance = 0.0 if written_on == resumed_on == "cpu" else 1e-9
    for step in (1, 6, 7):
        resumed_network, rest = train(resumed_on, ckpt_path=tmp_path / f"step={step}.ckpt")
        torch.testing.assert_close(table(rest), table(whole)[step:], rtol=0, atol=tolerance)
        for name, value in state_by_part(network).items():
            torch.testing.assert_close(state_by_part(resumed_network)[name], value, rtol=0, atol=tolerance)
