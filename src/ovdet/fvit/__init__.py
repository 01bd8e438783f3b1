"""F-ViT: a detector on a frozen, distilled CLIP vision transformer."""
