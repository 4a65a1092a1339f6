"""Stand-ins for the packages of loggers, as far as Lightning's loggers call them; they record what they receive."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


def _install(patch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__path__ = []
    vars(module).update(content)
    patch.setitem(sys.modules, name, module)
    parent, _, own = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], own, module)


class Image:
    """What `wandb.Image` is given."""

    def __init__(self, pixels: Any, **_: Any) -> None:
        self.pixels = pixels


class WandbRun:
    """Records logged values; `scalars` and `images` are name → step → value."""

    id = name = "stand-in"
    started: dict[str, Any]

    def __init__(self) -> None:
        self.scalars: dict[str, dict[int, float]] = {}
        self.images: dict[str, dict[int, Any]] = {}
        self.finished = 0
        self.config = SimpleNamespace(update=lambda *_, **__: None)

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, metrics: dict[str, Any]) -> None:
        step = metrics.get("trainer/global_step")
        for name, value in metrics.items():
            if isinstance(value, list) and step is not None:
                self.images.setdefault(name, {})[step] = value[0].pixels
            elif step is not None:
                self.scalars.setdefault(name, {})[step] = value


def wandb(patch: pytest.MonkeyPatch) -> WandbRun:
    """Install a stand-in for wandb; return the run that it will start."""
    run = WandbRun()

    def init(**given: Any) -> WandbRun:
        run.started = given
        sys.modules["wandb"].run = run  # type: ignore[attr-defined]
        return run

    def finish() -> None:
        run.finished += 1
        sys.modules["wandb"].run = None  # type: ignore[attr-defined]

    _install(patch, "wandb", run=None, init=init, finish=finish, Image=Image)
    _install(patch, "wandb.sdk")
    _install(patch, "wandb.sdk.lib", RunDisabled=type("RunDisabled", (), {}))
    _install(patch, "wandb.wandb_run", Run=WandbRun)
    patch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    return run


class MlflowClient:
    """Records logged values; `scalars` and `images` are name → step → value, for an image its file → pixels."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.scalars: dict[str, dict[int, float]] = {}
        self.images: dict[str, Any] = {}
        self.tags: dict[str, str] = {}
        made.append(self)

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=name, lifecycle_stage="active")

    def create_run(self, experiment_id: str, tags: dict[str, str]) -> Any:
        self.tags = tags
        return SimpleNamespace(info=SimpleNamespace(run_id="stand-in"))

    def get_run(self, run_id: str) -> bool:
        return True

    def set_terminated(self, run_id: str, status: str) -> None: ...

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        for one in metrics:
            self.scalars.setdefault(one.key, {})[one.step] = one.value

    def log_image(self, run_id: str, image: Any, artifact_file: str) -> None:
        self.images[artifact_file] = image


made: list[MlflowClient] = []


def mlflow(patch: pytest.MonkeyPatch) -> list[MlflowClient]:
    """Install a stand-in for mlflow; return the list that will have its clients."""
    made.clear()
    _install(patch, "mlflow", set_tracking_uri=lambda uri: None)
    _install(patch, "mlflow.tracking", MlflowClient=MlflowClient)
    _install(patch, "mlflow.tracking.context", registry=SimpleNamespace(resolve_tags=dict))
    _install(patch, "mlflow.tracking.context.registry", resolve_tags=dict)
    _install(patch, "mlflow.entities", Metric=SimpleNamespace, Param=SimpleNamespace)
    _install(patch, "mlflow.utils")
    _install(patch, "mlflow.utils.mlflow_tags", MLFLOW_RUN_NAME="mlflow.runName")
    patch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", True)
    return made
