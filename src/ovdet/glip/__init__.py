"""Grounded language-image pre-training (GLIP, CVPR 2022): detection as the grounding of phrases."""
