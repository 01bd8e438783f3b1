"""Tags of published weights: where they are fetched, and what of the model they change."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class PretrainedInfo:
    """Published weights.

    Attributes:
        repo: hub repository.
        quick_gelu: whether they were trained with QuickGELU.
        mean, std: pixel normalisation that they were trained with; None for that of the model's config.
        filenames: files tried, in order.
    """

    repo: str
    quick_gelu: bool = False
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    filenames: tuple[str, ...] = _FILES


def _openai(repo: str) -> PretrainedInfo:
    return PretrainedInfo(f"timm/{repo}.openai", quick_gelu=True)


_HALF = (0.5, 0.5, 0.5)

_VIT: dict[str, dict[str, PretrainedInfo]] = {
    "ViT-B-32": {
        "openai": _openai("vit_base_patch32_clip_224"),
        "laion400m_e32": PretrainedInfo("timm/vit_base_patch32_clip_224.laion400m_e32", quick_gelu=True),
        "laion2b_s34b_b79k": PretrainedInfo("laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        "datacomp_xl_s13b_b90k": PretrainedInfo("laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K"),
    },
    "ViT-B-16": {
        "openai": _openai("vit_base_patch16_clip_224"),
        "laion400m_e32": PretrainedInfo("timm/vit_base_patch16_clip_224.laion400m_e32"),
        "laion2b_s34b_b88k": PretrainedInfo("laion/CLIP-ViT-B-16-laion2B-s34B-b88K"),
        "datacomp_xl_s13b_b90k": PretrainedInfo("laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K"),
    },
    "ViT-L-14": {
        "openai": _openai("vit_large_patch14_clip_224"),
        "laion400m_e32": PretrainedInfo("timm/vit_large_patch14_clip_224.laion400m_e32"),
        # Trained on pixels in -1..1, unlike its siblings.
        "laion2b_s32b_b82k": PretrainedInfo("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", mean=_HALF, std=_HALF),
        "datacomp_xl_s13b_b90k": PretrainedInfo("laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K"),
    },
    "ViT-L-14-336": {"openai": _openai("vit_large_patch14_clip_336")},
}

_PRETRAINED: dict[str, dict[str, PretrainedInfo]] = {
    "EVA01-CLIP-g-14": {
        "laion400m_s11b_b41k": PretrainedInfo("timm/eva_giant_patch14_clip_224.laion400m_s11b_b41k"),
    },
    "EVA02-CLIP-B-16": {
        "merged2b_s8b_b131k": PretrainedInfo("timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k"),
    },
    "EVA02-CLIP-L-14": {
        "merged2b_s4b_b131k": PretrainedInfo("timm/eva02_large_patch14_clip_224.merged2b_s4b_b131k"),
    },
    "EVA02-CLIP-L-14-336": {
        "merged2b_s6b_b61k": PretrainedInfo("timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k"),
    },
    "EVA02-CLIP-bigE-14": {
        "laion2b_s4b_b115k": PretrainedInfo("timm/eva02_enormous_patch14_clip_224.laion2b_s4b_b115k"),
    },
    "ViT-H-14": {"laion2b_s32b_b79k": PretrainedInfo("laion/CLIP-ViT-H-14-laion2B-s32B-b79K")},
    "ViT-B-16-SigLIP2-256": {"webli": PretrainedInfo("timm/ViT-B-16-SigLIP2-256")},
    "ViT-L-16-SigLIP2-256": {"webli": PretrainedInfo("timm/ViT-L-16-SigLIP2-256")},
    **_VIT,
    # The same weights under the names that choose QuickGELU; only those that were trained with it.
    **{f"{m}-quickgelu": {t: i for t, i in tags.items() if i.quick_gelu} for m, tags in _VIT.items()},
}


def list_pretrained() -> list[tuple[str, str]]:
    """All (model, tag) pairs."""
    return [(model, tag) for model in sorted(_PRETRAINED) for tag in _PRETRAINED[model]]


def list_pretrained_tags(model: str) -> list[str]:
    """Tags of a model; empty for a model without published weights."""
    return list(_PRETRAINED.get(model, {}))


def pretrained_info(model: str, tag: str) -> PretrainedInfo:
    """What is known of a tag. ValueError naming the model's tags when there is no such one."""
    try:
        return _PRETRAINED[model][tag]
    except KeyError:
        tags = ", ".join(list_pretrained_tags(model)) or "none"
        raise ValueError(f'{model} has no pretrained tag "{tag}": its tags are {tags}') from None


def download(model: str, tag: str, cache_dir: str | Path | None = None) -> Path:
    """Path of a tag's weights, from the hub's cache or downloaded to it and verified.

    Args:
        cache_dir: the hub's cache folder; its default when None. With HF_HUB_OFFLINE=1 only the cache is looked into.

    Raises:
        ValueError: unknown tag.
        FileNotFoundError: not in the cache and not to be fetched; the message says what to fetch and where to put it.
        RuntimeError: the content has not the hash that the hub gives.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    info = pretrained_info(model, tag)
    failure: Exception | None = None
    for filename in info.filenames:
        try:
            path = Path(hf_hub_download(info.repo, filename, cache_dir=cache_dir))
        except LocalEntryNotFoundError as error:  # offline and not in the cache; another name may be
            failure = error
            continue
        except EntryNotFoundError as error:  # the repository has it under another name
            failure = error
            continue
        except Exception as error:  # connection, authorisation, proxies: many kinds
            failure = error
            break
        _verify(path, info.repo, filename)
        return path
    raise FileNotFoundError(
        f"{info.filenames[0]} of hub repository {info.repo} ({model}, {tag}) is not in the cache and cannot be fetched "
        f"({type(failure).__name__}): download it on a connected machine and give its path as pretrained=FILE, "
        f'or pretrained="eva", cache_dir=FILE'
    ) from failure


def _verify(path: Path, repo: str, filename: str) -> None:
    """Compare a cached file with the hash by which the hub's cache names its content.

    The cache links ``snapshots/REVISION/FILE`` to ``blobs/HASH``; for large files the hash is SHA-256.
    """
    blob = path.resolve().name
    if len(blob) != 64 or set(blob) - set("0123456789abcdef"):
        return  # a small file is named by its git hash, and a copied cache has no links
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    if digest.hexdigest() != blob:
        raise RuntimeError(
            f"{path} ({repo}, {filename}) is damaged: its SHA-256 is not {blob}; delete it and try again"
        )
