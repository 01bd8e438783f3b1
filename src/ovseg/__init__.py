"""Open-vocabulary segmentation: dense labels from CLIP's dense embeddings, their scores, and a student of them."""
