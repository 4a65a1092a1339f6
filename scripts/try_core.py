"""Installs the package without extras in a fresh environment, then trains, resumes and calls a command.

Example:
    python scripts/try_core.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ("PIL", "hydra", "matplotlib", "omegaconf", "rich", "tensorboard")
"""Packages that no dependency of the core installs. (Lightning installs yaml.)"""

TRAINING = f"""
import importlib.util
import logging
import sys
import warnings

import lightning as L
import torch
from torch import nn

import lightning_gradnorm
from lightning_gradnorm import GradientNormMonitor, GradNorm

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.simplefilter("ignore")
print("lightning_gradnorm", lightning_gradnorm.__version__, "in", lightning_gradnorm.__file__)
present = [name for name in {ABSENT} if importlib.util.find_spec(name) is not None]
assert not present, f"brought by the core's dependencies: {{present}}"


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.near, self.far = nn.Linear(8, 1), nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        x, near, far = batch
        z = self.encoder(x)
        losses = {{"near": (self.near(z) - near).square().mean(), "far": (self.far(z) - far).square().mean()}}
        return {{"loss": losses["near"] + losses["far"], **losses}}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(epochs, resume=None):
    L.seed_everything(0, verbose=False)
    x = torch.randn(64, 4)
    batches = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True), 10 * x[:, :1])
    gradnorm = GradNorm(["near", "far"], shared_layer="encoder.0")
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        callbacks=[gradnorm, GradientNormMonitor(["near", "far"], every_n_steps=4)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Model()
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=8), ckpt_path=resume, weights_only=True)
    return trainer, model, gradnorm


trainer, _, half = fit(1)
trainer.save_checkpoint("half.ckpt")
_, resumed_model, resumed = fit(2, resume="half.ckpt")
_, whole_model, whole = fit(2)
assert resumed.weights == whole.weights != half.weights
for one, other in zip(resumed_model.parameters(), whole_model.parameters(), strict=True):
    assert torch.equal(one, other)
print("weights after one epoch", half.weights)
print("after two, and after one and a resumed one", resumed.weights)
imported = [name for name in {ABSENT} if name in sys.modules]
assert not imported, imported
print("not installed:", ", ".join({ABSENT}))
"""


def main() -> None:
    """Run all steps and print their output.

    Raises:
        SystemExit: a step failed.
    """
    with tempfile.TemporaryDirectory() as place:
        programs, folder = Path(place) / "venv/bin", Path(place) / "elsewhere"
        folder.mkdir()
        venv.create(Path(place) / "venv", with_pip=True)

        def call(program: str, *arguments: str, status: int = 0) -> str:
            """Run one of the environment's programs, without any path back to the checkout."""
            clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
            done = subprocess.run(
                [programs / program, *arguments], cwd=folder, env=clean, capture_output=True, text=True, check=False
            )
            if done.returncode != status:
                sys.exit(f"{program} ended with status {done.returncode}\n{done.stdout}{done.stderr}")
            return done.stdout + done.stderr

        constraints = ROOT / "constraints.txt"
        call("python", "-m", "pip", "install", "--quiet", "--constraint", str(constraints), str(ROOT))
        installed = call("python", "-m", "pip", "list", "--format", "freeze")
        print("installed:", ", ".join(name for name in re.findall(r"^([\w.-]+)==", installed, re.MULTILINE)))
        print(call("python", "-c", TRAINING).strip())
        for command in ("gradnorm-train", "gradnorm-eval", "gradnorm-report"):
            told = call(command, "--help", status=1)
            assert told == f'{command} needs the experiments extra: pip install "lightning-gradnorm[experiments]"\n', (
                told
            )
            print(told.strip())


if __name__ == "__main__":
    main()
