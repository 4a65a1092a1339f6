"""A checkpoint rebuilds its own model, and nothing else."""

from __future__ import annotations

import io
import os
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_gradnorm import MultiTaskModule, Task
from lightning_gradnorm.multitask.architecture import pack, unpack


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("constant", torch.tensor([1.0, 2.0]), persistent=False)

    def forward(self, x):
        return self.layer(x) + self.constant


def _bytes_of(content) -> torch.Tensor:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


class Malicious:
    def __reduce__(self):
        return os.system, ("true",)


def test_modules_come_back_with_their_shapes_and_settings() -> None:
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.3), nn.Flatten())
    parts = unpack(pack({"encoder": encoder, "optimizer": partial(torch.optim.SGD, lr=0.5, momentum=0.9)}))
    assert repr(parts["encoder"]) == repr(encoder)
    assert parts["optimizer"].keywords == {"lr": 0.5, "momentum": 0.9}
    parts["encoder"].load_state_dict(encoder.state_dict())
    for name, value in encoder.state_dict().items():
        assert torch.equal(parts["encoder"].state_dict()[name], value)


def test_weights_take_no_room() -> None:
    assert len(pack({"encoder": nn.Linear(2000, 2000)})) < 10_000


def test_the_packed_model_does_not_change() -> None:
    encoder = nn.Linear(3, 3)
    before = encoder.weight.detach().clone()
    pack({"encoder": encoder})
    assert torch.equal(encoder.weight, before)
    assert encoder.weight.is_contiguous()


def test_tied_weights_stay_tied() -> None:
    encoder = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    encoder[1].weight = encoder[0].weight
    rebuilt = unpack(pack({"encoder": encoder}))["encoder"]
    assert rebuilt[1].weight is rebuilt[0].weight
    assert rebuilt[0].weight.is_contiguous()


def test_buffers_that_no_state_dict_holds_keep_their_values() -> None:
    rebuilt = unpack(pack({"encoder": Own()}), trusted=True)["encoder"]
    assert rebuilt.constant.tolist() == [1.0, 2.0]


def test_a_class_of_another_package_is_named_and_not_built() -> None:
    with pytest.raises(ValueError, match=r"Own"):
        unpack(pack({"encoder": Own()}))


def test_a_call_hidden_in_the_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"system"):
        unpack(_bytes_of({"encoder": Malicious()}))


def test_torch_functions_that_reach_out_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.hub.load"):
        unpack(pack({"loss": partial(torch.hub.load, "somewhere")}))


def test_what_cannot_be_pickled_is_an_error_once_it_is_needed() -> None:
    packed = pack({"loss": lambda prediction, target: prediction - target})
    assert isinstance(packed, str)
    with pytest.raises(ValueError, match="could not be pickled"):
        unpack(packed)


def _model(encoder: nn.Module) -> MultiTaskModule:
    tasks = {
        "a": Task(nn.Linear(2, 1), nn.functional.mse_loss),
        "b": Task(nn.Linear(2, 3), nn.CrossEntropyLoss(), {"accuracy": MulticlassAccuracy(3)}),
    }
    return MultiTaskModule(encoder, tasks, optimizer=partial(torch.optim.Adam, lr=0.1), accumulate_grad_batches=2)


def _saved(model: MultiTaskModule, path, quiet_trainer) -> str:
    batch = (torch.ones(4, 2), {"a": torch.ones(4, 1), "b": torch.zeros(4, dtype=torch.long)})
    quiet_trainer(max_epochs=1).fit(model, DataLoader([batch], batch_size=None))
    model.trainer.save_checkpoint(path / "model.ckpt")
    return str(path / "model.ckpt")


def test_a_module_is_loaded_from_its_checkpoint_alone(tmp_path, quiet_trainer) -> None:
    model = _model(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    loaded = MultiTaskModule.load_from_checkpoint(_saved(model, tmp_path, quiet_trainer))
    x = torch.randn(5, 2)
    for task, prediction in model(x).items():
        assert torch.equal(prediction, loaded(x)[task])
    assert loaded.accumulate_grad_batches == 2
    assert loaded.optimizer.keywords == {"lr": 0.1}


def test_a_module_with_own_classes_reports_what_to_pass_and_then_loads(tmp_path, quiet_trainer) -> None:
    model = _model(Own())
    path = _saved(model, tmp_path, quiet_trainer)
    with pytest.raises(ValueError, match=r"Own\. Give encoder= and tasks= again"):
        MultiTaskModule.load_from_checkpoint(path)
    again = _model(Own())
    loaded = MultiTaskModule.load_from_checkpoint(path, encoder=again.encoder, tasks=dict(again.tasks.items()))
    assert torch.equal(loaded.encoder.layer.weight, model.encoder.layer.weight)


def test_the_default_optimizer_comes_back() -> None:
    model = MultiTaskModule(nn.Linear(2, 2), {"a": Task(nn.Linear(2, 1), nn.MSELoss())})
    assert unpack(pack({"optimizer": model.optimizer}))["optimizer"] is model.optimizer
