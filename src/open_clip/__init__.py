"""CLIP models with dense and region embeddings; a fork of OpenCLIP in API and weights."""

from .configs import CLIPTextCfg, CLIPVisionCfg, add_model_config, list_models
from .constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from .dense_input import DenseInput, DenseTransform, dense_transform
from .factory import (
    create_loss,
    create_model,
    create_model_and_transforms,
    create_model_from_pretrained,
    get_model_config,
    get_tokenizer,
    load_checkpoint,
)
from .image_tower import ImageTower
from .loss import ClipLoss, DistillClipLoss, SigLipLoss
from .model import CLIP
from .model_info import get_model_preprocess_cfg, get_model_tokenize_cfg, set_model_preprocess_cfg, trace_model
from .openai import list_openai_models, load_openai_model
from .precision import convert_weights_to_fp16, convert_weights_to_lp, get_cast_dtype, get_input_dtype
from .pretrained import (
    download_pretrained,
    download_pretrained_from_url,
    get_pretrained_cfg,
    get_pretrained_url,
    is_pretrained_cfg,
    list_pretrained,
    list_pretrained_models_by_tag,
    list_pretrained_tags_by_model,
)
from .prompts import class_embeddings, read_class_names
from .push_to_hf_hub import push_pretrained_to_hf_hub, push_to_hf_hub, save_pretrained
from .readouts import Readout, build_readout, list_readouts
from .text_tower import TextTower
from .tokenizer import HFTokenizer, SimpleTokenizer, decode, tokenize
from .version import __version__ as __version__
from .whole_images import AugmentationCfg, PreprocessCfg, image_transform
from .zero_shot_classifier import build_zero_shot_classifier, build_zero_shot_classifier_legacy
from .zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

#: OpenCLIP's name of a model whose text tower is a module of its own, which every model here is.
CustomTextCLIP = CLIP

__all__ = [
    "AugmentationCfg",
    "CLIP",
    "CLIPTextCfg",
    "CLIPVisionCfg",
    "ClipLoss",
    "CustomTextCLIP",
    "DenseInput",
    "DenseTransform",
    "DistillClipLoss",
    "HFTokenizer",
    "IMAGENET_CLASSNAMES",
    "ImageTower",
    "OPENAI_DATASET_MEAN",
    "OPENAI_DATASET_STD",
    "OPENAI_IMAGENET_TEMPLATES",
    "PreprocessCfg",
    "Readout",
    "SIMPLE_IMAGENET_TEMPLATES",
    "SigLipLoss",
    "SimpleTokenizer",
    "TextTower",
    "add_model_config",
    "build_readout",
    "build_zero_shot_classifier",
    "build_zero_shot_classifier_legacy",
    "class_embeddings",
    "convert_weights_to_fp16",
    "convert_weights_to_lp",
    "create_loss",
    "create_model",
    "create_model_and_transforms",
    "create_model_from_pretrained",
    "decode",
    "dense_transform",
    "download_pretrained",
    "download_pretrained_from_url",
    "get_cast_dtype",
    "get_input_dtype",
    "get_model_config",
    "get_model_preprocess_cfg",
    "get_model_tokenize_cfg",
    "get_pretrained_cfg",
    "get_pretrained_url",
    "get_tokenizer",
    "image_transform",
    "is_pretrained_cfg",
    "list_models",
    "list_openai_models",
    "list_pretrained",
    "list_pretrained_models_by_tag",
    "list_pretrained_tags_by_model",
    "list_readouts",
    "load_checkpoint",
    "load_openai_model",
    "push_pretrained_to_hf_hub",
    "push_to_hf_hub",
    "read_class_names",
    "save_pretrained",
    "set_model_preprocess_cfg",
    "tokenize",
    "trace_model",
]
