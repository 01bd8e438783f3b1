"""Tags of published weights: where they are fetched, and what of the model they change."""

from __future__ import annotations

import hashlib
import json
import logging
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .configs import canonical, known_config, list_models, why_refused
from .whole_images import PreprocessCfg

log = logging.getLogger(__name__)

_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class PretrainedInfo:
    """Published weights.

    Attributes:
        repo: hub repository.
        quick_gelu: whether they were trained with QuickGELU.
        mean, std, interpolation, resize_mode: preparation of images that they were trained with; None for that of the
            model's config.
        filenames: files tried, in order.
    """

    repo: str
    quick_gelu: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    resize_mode: str | None = None
    filenames: tuple[str, ...] = _FILES

    @property
    def preprocess(self) -> dict[str, Any]:
        """What of the preparation of images differs from the model's config."""
        values = {k: getattr(self, k) for k in ("mean", "std", "interpolation", "resize_mode")}
        return {k: v for k, v in values.items() if v is not None}


# Names of the published EVA-CLIP code for models that OpenCLIP names otherwise.
_EVA_NAMES = {
    "EVA01-CLIP-g-14": "EVA01-g-14", "EVA02-CLIP-B-16": "EVA02-B-16", "EVA02-CLIP-L-14": "EVA02-L-14",
    "EVA02-CLIP-L-14-336": "EVA02-L-14-336", "EVA02-CLIP-bigE-14": "EVA02-E-14",
}  # fmt: skip


def _read_tags() -> dict[str, dict[str, PretrainedInfo]]:
    content = json.loads((Path(__file__).parent / "pretrained_tags.json").read_text(encoding="utf-8"))
    lists = {"mean", "std"}
    tags = {
        model: {t: PretrainedInfo(**{k: tuple(v) if k in lists else v for k, v in e.items()}) for t, e in of.items()}
        for model, of in content.items()
    }
    tags |= {name: tags[other] for name, other in _EVA_NAMES.items()}
    # The same weights under the names that choose QuickGELU; only those that were trained with it.
    for model in [m for m in list_models() if m.endswith("-quickgelu")]:
        trained = {t: i for t, i in tags.get(model.removesuffix("-quickgelu"), {}).items() if i.quick_gelu}
        if trained:
            tags[model] = trained
    return tags


_PRETRAINED = _read_tags()


def _clean(tag: str) -> str:
    return tag.lower().replace("-", "_")


def list_pretrained(as_str: bool = False) -> list[tuple[str, str]] | list[str]:
    """All (model, tag) pairs whose weights can be fetched; as ``"model:tag"`` with ``as_str``."""
    pairs = [(model, tag) for model in sorted(_PRETRAINED) for tag in _PRETRAINED[model]]
    return [f"{model}:{tag}" for model, tag in pairs] if as_str else pairs


def list_pretrained_tags_by_model(model: str) -> list[str]:
    """Tags of a model; empty for a model without published weights."""
    return list(_PRETRAINED.get(canonical(model), {}))


def list_pretrained_models_by_tag(tag: str) -> list[str]:
    """Models that have weights of a tag, sorted."""
    return sorted(model for model, tags in _PRETRAINED.items() if _clean(tag) in map(_clean, tags))


def pretrained_info(model: str, tag: str) -> PretrainedInfo:
    """What is known of a tag. ValueError naming the model's tags when there is no such one."""
    found = [info for name, info in _PRETRAINED.get(canonical(model), {}).items() if _clean(name) == _clean(tag)]
    if not found:
        if reason := why_refused(canonical(model)):
            raise ValueError(f"{model} of OpenCLIP has no dense reading: {reason}")
        tags = ", ".join(list_pretrained_tags_by_model(model)) or "none"
        raise ValueError(f'{model} has no pretrained tag "{tag}": its tags are {tags}')
    return found[0]


def is_pretrained_cfg(model: str, tag: str) -> bool:
    """Whether there are published weights of a model by a tag."""
    return any(_clean(name) == _clean(tag) for name in list_pretrained_tags_by_model(model))


def get_pretrained_cfg(model: str, tag: str) -> dict[str, Any]:
    """What is known of a tag, as a dict: ``hf_hub``, ``quick_gelu``, ``mean``, ``std``, ``interpolation``,
    ``resize_mode``. Empty when there is no such tag."""
    if not is_pretrained_cfg(model, tag):
        return {}
    info = pretrained_info(model, tag)
    prep = PreprocessCfg.of({**known_config(model).get("preprocess_cfg", {}), **info.preprocess})
    return {
        "hf_hub": f"{info.repo}/", "quick_gelu": info.quick_gelu, "mean": prep.mean, "std": prep.std,
        "interpolation": prep.interpolation, "resize_mode": prep.resize_mode,
    }  # fmt: skip


def get_pretrained_url(model: str, tag: str) -> str:
    """Address of a tag's weights on the hub; empty when there is no such tag."""
    from huggingface_hub import hf_hub_url

    return hf_hub_url(pretrained_info(model, tag).repo, _FILES[0]) if is_pretrained_cfg(model, tag) else ""


# -- fetching ---------------------------------------------------------------------------------------------------------


def download(model: str, tag: str, cache_dir: str | Path | None = None) -> Path:
    """Path of a tag's weights, from the hub's cache or downloaded to it and verified.

    Args:
        cache_dir: the hub's cache folder; its default when None. With HF_HUB_OFFLINE=1 only the cache is looked into.

    Raises:
        ValueError: unknown tag.
        FileNotFoundError: not in the cache and not to be fetched; the message says what to fetch and where to put it.
        RuntimeError: the content has not the hash that the hub gives.
    """
    info = pretrained_info(model, tag)
    return from_hub(info.repo, info.filenames, cache_dir, what=f"{model}, {tag}")


def _hub_cache(cache_dir: str | Path | None) -> Path | None:
    """The folder of a download; None, the hub's own, also where ``cache_dir`` names a checkpoint, as for "eva"."""
    if not cache_dir:
        return None
    if Path(cache_dir).is_file() or Path(cache_dir).suffix in (".pt", ".bin", ".pth", ".safetensors"):
        log.info("cache_dir %s is a checkpoint file: what is downloaded goes to the hub's own cache", cache_dir)
        return None
    return Path(cache_dir)


def from_hub(
    repo: str,
    filenames: tuple[str, ...],
    cache_dir: str | Path | None = None,
    *,
    what: str = "",
    revision: str | None = None,
) -> Path:
    """The first of several files that a hub repository has, from the cache or downloaded to it and verified.

    Raises:
        FileNotFoundError: none is in the cache or to be fetched.
        RuntimeError: the content has not the hash that the hub gives.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    failure: Exception | None = None
    for filename in filenames:
        try:
            path = Path(hf_hub_download(repo, filename, cache_dir=_hub_cache(cache_dir), revision=revision))
        except (LocalEntryNotFoundError, EntryNotFoundError) as error:
            failure = error  # offline and not in the cache, or under another name: the next may be there
            continue
        except Exception as error:  # connection, authorisation, proxies: many kinds
            failure = error
            break
        _verify(path, repo, filename)
        return path
    remedy = (
        'download it on a connected machine and give its path as pretrained=FILE, or pretrained="eva", cache_dir=FILE'
        if filenames == _FILES
        else "download the repository on a connected machine and give its folder as local-dir:FOLDER"
    )
    raise FileNotFoundError(
        f"{filenames[0]} of hub repository {repo}{f' ({what})' if what else ''} is not in the cache and cannot be "
        f"fetched ({type(failure).__name__}): {remedy}"
    ) from failure


def download_pretrained(cfg: dict[str, Any], prefer_hf_hub: bool = True, cache_dir: str | Path | None = None) -> str:
    """Path of the weights that a dict of :func:`get_pretrained_cfg` tells of; empty for one that tells of none.

    Args:
        cfg: ``hf_hub`` (repository, ``"/"``, optionally a file name), ``url``, or ``file``.
        prefer_hf_hub: the hub before a ``url``.
    """
    if file := cfg.get("file"):
        return str(file)
    hub, url = cfg.get("hf_hub", ""), cfg.get("url", "")
    if url and not (hub and prefer_hf_hub):
        return download_pretrained_from_url(url, cache_dir)
    if not hub:
        return ""
    owner, name, *rest = hub.split("/", 2)
    return str(from_hub(f"{owner}/{name}", (rest[0],) if rest and rest[0] else _FILES, cache_dir))


def download_pretrained_from_url(url: str, cache_dir: str | Path | None = None) -> str:
    """Path of a file fetched by http(s) to a folder (``~/.cache/clip`` when None); one that is there is not fetched.

    A SHA-256 that stands in the address, as in OpenAI's, is compared.

    Raises:
        FileNotFoundError: it cannot be fetched.
        RuntimeError: it has another hash.
    """
    from torch.hub import download_url_to_file

    parts = urllib.parse.urlparse(url).path.rstrip("/").split("/")
    folder = Path(cache_dir) if cache_dir else Path.home() / ".cache" / "clip"
    target = folder / parts[-1]
    stated = next((p for p in parts if len(p) == 64 and not set(p) - set("0123456789abcdef")), None)
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            download_url_to_file(url, str(target))
        except OSError as error:
            raise FileNotFoundError(f"{url} cannot be fetched ({error}): give a file instead") from error
    if stated is not None and _sha256(target) != stated:
        raise RuntimeError(f"{target} ({url}) is damaged: its SHA-256 is not {stated}; delete it and try again")
    return str(target)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def _verify(path: Path, repo: str, filename: str) -> None:
    """Compare a cached file with the hash by which the hub's cache names its content.

    The cache links ``snapshots/REVISION/FILE`` to ``blobs/HASH``; for large files the hash is SHA-256.
    """
    blob = path.resolve().name
    if len(blob) != 64 or set(blob) - set("0123456789abcdef"):
        return  # a small file is named by its git hash, and a copied cache has no links
    if _sha256(path) != blob:
        raise RuntimeError(
            f"{path} ({repo}, {filename}) is damaged: its SHA-256 is not {blob}; delete it and try again"
        )
