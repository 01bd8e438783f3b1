"""ViLD: open-vocabulary detection by distilling a CLIP model's embeddings of regions (Gu et al. 2022)."""
