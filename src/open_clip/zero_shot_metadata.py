"""Class names and prompts of zero-shot classification on ImageNet."""

from __future__ import annotations

from torchvision.models._meta import _IMAGENET_CATEGORIES

#: The 1000 classes in the order of their numbers, by torchvision's names. OpenAI's list, with which accuracies of CLIP
#: are published, words 362 of them otherwise ("rooster" for "cock"); give that list to reproduce those figures.
IMAGENET_CLASSNAMES: tuple[str, ...] = tuple(_IMAGENET_CATEGORIES)

_ARTICLES = ("a", "the")
_PHOTOS = (
    "bad", "low resolution", "cropped", "bright", "dark", "close-up", "black and white", "pixelated", "jpeg corrupted",
    "blurry", "good",
)  # fmt: skip
_THINGS = ("hard to see", "clean", "dirty", "cool", "large", "nice", "weird", "small")
_WORKS = (
    "a sculpture", "a rendering", "a tattoo", "a drawing", "a painting", "a doodle", "a sketch", "a rendition",
    "graffiti", "art", "itap",
)  # fmt: skip
_MATERIALS = ("embroidered", "plastic", "origami", "toy", "cartoon", "plushie")


def _openai_prompts() -> list[str]:
    """The 80 prompts of CLIP's paper, put together from their parts; the mean over them has no order."""
    prompts = ["a photo of many {}.", "a photo of my {}.", "a photo of one {}.", "itap of my {}."]
    for article in _ARTICLES:
        prompts += [f"a {kind} photo of {article} {{}}." for kind in _PHOTOS]
        prompts += [f"a photo of {article} {kind} {{}}." for kind in _THINGS]
        prompts += [f"{work} of {article} {{}}." for work in _WORKS]
        prompts += [f"{article} {kind} {{}}." for kind in _MATERIALS]
        prompts += [f"a photo of {article} {{}}.", f"{article} {{}} in a video game."]
    return prompts


#: Prompts as functions of a class name, as OpenCLIP has them.
OPENAI_IMAGENET_TEMPLATES = tuple(prompt.format for prompt in _openai_prompts())
#: Seven of them that do nearly as well.
SIMPLE_IMAGENET_TEMPLATES = tuple(
    prompt.format
    for prompt in (
        "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.", "a {} in a video game.",
        "art of the {}.", "a photo of the small {}.",
    )
)  # fmt: skip
