"""F-ViT: open-vocabulary detection on a frozen, distilled CLIP vision transformer."""

from __future__ import annotations
