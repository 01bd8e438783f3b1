"""Pixel normalisations that published models were trained with, as (red, green, blue) of values in 0..1."""

from .image_tower import OPENAI_MEAN, OPENAI_STD

OPENAI_DATASET_MEAN, OPENAI_DATASET_STD = OPENAI_MEAN, OPENAI_STD
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INCEPTION_MEAN, INCEPTION_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
