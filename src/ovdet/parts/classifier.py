"""Classes as directions in the VLM's joint space: cosine times a temperature."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovdet.parts.numbers import widened

TEMPERATURES = ("linear", "log", "fixed")


class CosineClassifier(nn.Module):
    """``temperature * cosine(embedding, class embedding)``, in float32 (or float64, for such embeddings).

    Args:
        temperature: start value.
        kind: ``"linear"``: the temperature itself is the parameter (``temperature``); ``"log"``: its logarithm is
            (``log_temperature``), so that steps are relative; ``"fixed"``: it is not learned.

    Raises:
        ValueError: another kind, or a temperature that is not positive.
    """

    def __init__(self, temperature: float, kind: str = "linear") -> None:
        super().__init__()
        if kind not in TEMPERATURES:
            raise ValueError(f'kind of temperature is "{kind}": use one of {", ".join(TEMPERATURES)}')
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature}: give a positive number")
        self.kind, self.start = kind, temperature
        if kind == "linear":
            self.temperature = nn.Parameter(torch.tensor(float(temperature)))
        elif kind == "log":
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def value(self) -> Tensor | float:
        """The temperature as it stands, with its gradient."""
        if self.kind == "linear":
            return self.temperature
        return self.log_temperature.exp() if self.kind == "log" else self.start

    def forward(self, embeddings: Tensor, class_embeddings: Tensor, temperature: float = 0.0) -> Tensor:
        """Logits ``[K, C]`` of embeddings ``[K, D]`` (of any length; zeros give zeros).

        Args:
            class_embeddings: ``[C, D]``, unit length.
            temperature: in place of the learned one; 0 = the learned one.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = F.normalize(widened(embeddings), dim=-1)
            cosine = embeddings @ class_embeddings.to(embeddings.dtype).T
            return cosine * (temperature if temperature else self.value())
