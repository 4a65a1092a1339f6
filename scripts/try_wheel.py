"""Installs a wheel with the `experiments` extra in a fresh environment, and uses its commands in another folder.

Example:
    python scripts/try_wheel.py dist
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
SMALL = ["data.train_size=400", "data.val_size=100", "data.test_size=100", "trainer.max_epochs=2"]
QUIET = ["trainer.enable_progress_bar=false", "trainer.enable_model_summary=false"]


def main() -> None:
    (wheel,) = (path.resolve() for path in Path(sys.argv[1]).glob("*.whl"))
    with tempfile.TemporaryDirectory() as place:
        programs, folder = Path(place) / "venv/bin", Path(place) / "elsewhere"
        folder.mkdir()
        venv.create(Path(place) / "venv", with_pip=True)

        def call(program: str, *arguments: str) -> str:
            """Run one of the environment's programs, without any path back to the checkout."""
            clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
            done = subprocess.run(
                [programs / program, *arguments], cwd=folder, env=clean, capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                sys.exit(
                    f"{program} {' '.join(arguments)} ended with status {done.returncode}\n{done.stdout}{done.stderr}"
                )
            return done.stdout + done.stderr

        extra = f"lightning-gradnorm[experiments] @ {wheel.as_uri()}"
        call("python", "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS), extra)
        found = call(
            "python", "-c", "import lightning_gradnorm as package; print(package.__version__, package.__file__)"
        )
        version, file = found.split(maxsplit=1)
        assert file.startswith(str(programs.parent)), file
        assert wheel.name.split("-")[1] == version, version
        for balancing in ("gradnorm", "equal"):
            call("gradnorm-train", *SMALL, *QUIET, f"balancing={balancing}", f"hydra.run.dir=runs/{balancing}")
        tested = json.loads((folder / "runs/gradnorm/test_metrics.json").read_text())
        assert "task_0" in call("gradnorm-eval", "ckpt_path=runs/gradnorm/checkpoints/best.ckpt", *QUIET)
        call("gradnorm-report", "runs")
        report = (folder / "runs/report.md").read_text()
        assert "gradnorm" in report
        assert "equal" in report
        assert sorted(path.name for path in folder.iterdir()) == ["runs"]
    print(f"{wheel.name} trains, evaluates and reports; test metrics: {', '.join(sorted(tested))}")


if __name__ == "__main__":
    main()
