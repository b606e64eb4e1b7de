"""Lightning: a callback that saves into ``Checkpoints``, and a ``CheckpointIO`` that resumes from what it saved.

from trajstore.checkpoint.lightning import CheckpointCallback, CheckpointIO

with Checkpoints("ckpts", keep_best=("val_loss", "min", 2)) as ckpts:
    callback = CheckpointCallback(ckpts, every_n_steps=500)
    trainer = Trainer(callbacks=[callback], plugins=[CheckpointIO()])
    trainer.fit(model, ckpt_path=callback.path())  # None in a folder that is empty: from scratch
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

try:
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.plugins.io import CheckpointIO as LightningIO
except ImportError:
    from pytorch_lightning.callbacks import Callback
    from pytorch_lightning.plugins.io import CheckpointIO as LightningIO

from trajstore.checkpoint import tensors
from trajstore.checkpoint.checkpoints import Checkpoints
from trajstore.checkpoint.single import is_checkpoint, load_state, save_state
from trajstore.errors import SchemaError
from trajstore.media.publish import discard
from trajstore.media.storage import LocalStorage


class CheckpointCallback(Callback):  # type: ignore[misc]
    """Saves the trainer's checkpoint every so many optimizer steps, or at the end of every so many epochs.

    Parameters
    ----------
    checkpoints : opened by the caller, who closes it.
    every_n_steps, every_n_epochs : at least one of the two; steps are the trainer's ``global_step``.
    weights_only : leave optimizers, schedulers and loops out.

    Notes
    -----
    Metrics of a checkpoint are the trainer's ``callback_metrics``. Saving is done by the process of rank zero, so it
    fits strategies whose checkpoint is whole there (a single device, DDP); for sharded ones there is ``dcp``.
    """

    def __init__(
        self, checkpoints: Checkpoints, *, every_n_steps: int | None = None, every_n_epochs: int | None = None,
        weights_only: bool = False,
    ) -> None:  # fmt: skip
        if every_n_steps is None and every_n_epochs is None:
            raise SchemaError("neither every_n_steps nor every_n_epochs is given")
        self._checkpoints = checkpoints
        self._steps = every_n_steps
        self._epochs = every_n_epochs
        self._weights_only = weights_only
        self._last = 0

    def path(self, which: int | str = "latest") -> str | None:
        """The path of a checkpoint, for ``trainer.fit(ckpt_path=...)``; ``None`` if there is no checkpoint at all."""
        if self._checkpoints.latest() is None:
            return None
        if which == "best":
            best = self._checkpoints.best()
            return best.path if best is not None else None
        return self._checkpoints._shelf.find(which).path

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._last = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if self._steps is not None and step // self._steps > self._last // self._steps:
            self.save(trainer)
        if self._checkpoints.interrupted:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._epochs is not None and (trainer.current_epoch + 1) % self._epochs == 0:
            self.save(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.save(trainer, final=True)

    def save(self, trainer: Any, *, final: bool = False) -> None:
        """Save now."""
        self._last = trainer.global_step
        # Every rank takes part in making the checkpoint, rank zero alone writes it.
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(self._weights_only)
        if trainer.is_global_zero:
            metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
            self._checkpoints.save(trainer.global_step, plain(checkpoint), metrics, final=final)


class CheckpointIO(LightningIO):  # type: ignore[misc]
    """Lightning's own saving and loading, into folders that are checkpoints here.

    Loads what :class:`CheckpointCallback` saved, what it saved itself (``trainer.save_checkpoint``,
    ``ModelCheckpoint``), and Lightning's plain files.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save_state(path, plain(checkpoint), step=int(checkpoint.get("global_step", 0)))

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        if is_checkpoint(path):
            return tensors.moved(load_state(path), map_location)
        return torch.load(path, map_location=map_location, weights_only=weights_only is not False)

    def remove_checkpoint(self, path: str | Path) -> None:
        folder, name = os.path.split(os.path.abspath(path))
        discard(LocalStorage(folder), name)


def plain(value: Any) -> Any:
    """Lightning's own dict classes as dicts; all else as it is."""
    if isinstance(value, Mapping) and type(value) is not OrderedDict:
        return {key: plain(item) for key, item in value.items()}
    if type(value) is list:
        return [plain(item) for item in value]
    if type(value) is tuple:
        return tuple(plain(item) for item in value)
    return value
