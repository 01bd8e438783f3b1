"""Several dense readings of the same windows from one pass of the network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ovseg.external import ExternalModel


class DenseReader:
    def __init__(
        self,
        model: nn.Module,
        readouts: Sequence[str | None],
        *,
        external: ExternalModel | None = None,
        keys: bool = False,
    ) -> None:
        self.model = model
        self.names = list(dict.fromkeys(readouts))
        self.external = external
        self.keys = keys

    @torch.no_grad()
    def __call__(self, windows: Tensor) -> tuple[dict[str | None, Tensor], Tensor | None]:
        dense = self.model.visual.encode_dense(windows)
        return {name: dense for name in self.names}, dense.flatten(2).transpose(1, 2) if self.keys else None
