"""Open-vocabulary segmentation: dense labels from CLIP's dense embeddings, their scores, and a student of them.

import open_clip
from ovseg import segment

model = open_clip.create_model("ViT-B-16-quickgelu", "openai").eval()
tokenizer = open_clip.get_tokenizer("ViT-B-16-quickgelu")
found = segment("street.jpg", model, ["road", "sky", "tree|bush", "car"], tokenizer=tokenizer, readout="sclip")
found.labels        # uint8 [H, W], 0..3
"""

from ovseg.classes import ClassList, class_list, embed_words, parse_classes
from ovseg.labels import Labels
from ovseg.protocols import Protocol, preset
from ovseg.segment import Segmenter, segment

__all__ = [
    "ClassList",
    "Labels",
    "Protocol",
    "Segmenter",
    "class_list",
    "embed_words",
    "parse_classes",
    "preset",
    "segment",
]
