"""Lightning as it is installed: `lightning`, else `pytorch_lightning`."""

from typing import TYPE_CHECKING

from curvature_callbacks._optional import is_available, require

if TYPE_CHECKING or is_available("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import Logger
else:
    require("pytorch_lightning", extra="lightning")
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.loggers import Logger

__all__ = ["Callback", "LightningModule", "Logger", "Trainer"]
