"""CLIP models with dense and region embeddings; a fork of OpenCLIP in API and weights."""

from .factory import (
    add_model_config,
    create_model,
    create_model_and_transforms,
    create_model_from_pretrained,
    get_model_config,
    get_tokenizer,
    list_models,
    list_pretrained,
)
from .image_tower import OPENAI_MEAN as OPENAI_DATASET_MEAN
from .image_tower import OPENAI_STD as OPENAI_DATASET_STD
from .image_tower import ImageTower
from .model import CLIP
from .text_tower import TextTower
from .tokenizer import tokenize

__version__ = "4.0.0"
__all__ = [
    "CLIP",
    "ImageTower",
    "OPENAI_DATASET_MEAN",
    "OPENAI_DATASET_STD",
    "TextTower",
    "add_model_config",
    "create_model",
    "create_model_and_transforms",
    "create_model_from_pretrained",
    "get_model_config",
    "get_tokenizer",
    "list_models",
    "list_pretrained",
    "tokenize",
]
