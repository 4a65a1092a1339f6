"""FSDP2 for models without a ``configure_model``: `trainer=fsdp`."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from typing_extensions import override

from lightning_gradnorm import MultiTaskModule


class FullyShard(ModelParallelStrategy):
    """Shards parameters, gradients and optimizer state across all processes. The encoder and each head are one unit.

    A module with its own ``configure_model`` decides itself what to shard. Checkpoints are single files, as usual.

    Args:
        options: options of Lightning's ``ModelParallelStrategy``, except the sizes of the mesh.

    Raises:
        ValueError: the model is not a `MultiTaskModule` and has no ``configure_model``, or has parameters outside the units.

    Example:
        >>> trainer = L.Trainer(strategy=FullyShard(), accelerator="cpu", devices=2, logger=False)
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"save_distributed_checkpoint": False, **options})

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
        module = self.lightning_module
        assert module is not None
        if type(module).configure_model is L.LightningModule.configure_model:
            module.configure_model = self._shard  # type: ignore[method-assign]

    def _shard(self) -> None:
        module = self.lightning_module
        if not isinstance(module, MultiTaskModule):
            raise ValueError(
                f"{type(self).__name__}: {type(module).__name__} should shard itself, because it is not a MultiTaskModule with "
                f"known parts. Give it a configure_model that calls fully_shard, or use trainer=ddp."
            )
        units = ["encoder", *module.task_heads.values()]
        own = [
            name for name, _ in module.named_parameters() if not name.startswith(tuple(f"{unit}." for unit in units))
        ]
        if own:
            raise ValueError(
                f"{type(self).__name__}: parameters should be in the encoder or in a head, because each process keeps its own "
                f"copy of all others; {own[0]} is in neither. Use trainer=ddp, or give the module a configure_model."
            )
        for unit in units:
            part = module.get_submodule(unit)
            if not hasattr(part, "unshard") and any(
                True for _ in part.parameters()
            ):  # shard once for training and test
                fully_shard(part, mesh=self.device_mesh["data_parallel"])
