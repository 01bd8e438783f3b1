"""Models by ``hf-hub:REPOSITORY`` and ``local-dir:FOLDER``: a config and weights that lie beside each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .configs import known_config, read_config
from .pretrained import from_hub

CONFIG_NAME = "open_clip_config.json"
#: Names of weights files, in the order in which they are looked for.
WEIGHT_NAMES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "open_clip_pytorch_model.pt", "model.safetensors", "pytorch_model.bin",
)  # fmt: skip
_SCHEMES = ("hf-hub:", "local-dir:")


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        scheme: ``"hf-hub"``, ``"local-dir"``, or ``""`` for a registered name.
        place: repository (``owner/name``, optionally ``@revision``), folder, or the name.
    """

    scheme: str
    place: str

    @property
    def repo(self) -> str:
        """Repository without its revision."""
        return self.place.partition("@")[0]

    @property
    def revision(self) -> str | None:
        """Revision of a repository; None for its main branch."""
        return self.place.partition("@")[2] or None

    def config(self, cache_dir: str | Path | None = None) -> dict:
        """The model's config (a copy); raises ValueError or FileNotFoundError when there is none."""
        if not self.scheme:
            return known_config(self.place)
        if self.scheme == "local-dir":
            folder = Path(self.place)
            if not (folder / CONFIG_NAME).is_file():
                raise FileNotFoundError(
                    f"folder {folder} has no {CONFIG_NAME}: give a folder that save_pretrained or OpenCLIP wrote"
                )
            return read_config(folder / CONFIG_NAME)
        return read_config(from_hub(self.repo, (CONFIG_NAME,), cache_dir, revision=self.revision))

    def weights(self, cache_dir: str | Path | None = None) -> Path | None:
        """File of the model's weights; None for a registered name, whose weights go by tags."""
        if not self.scheme:
            return None
        if self.scheme == "hf-hub":
            return from_hub(self.repo, WEIGHT_NAMES, cache_dir, revision=self.revision)
        found = [f for name in WEIGHT_NAMES if (f := Path(self.place) / name).is_file()]
        if not found:
            raise FileNotFoundError(f"folder {self.place} has no weights: looked for {', '.join(WEIGHT_NAMES)}")
        return found[0]

    def tokenizer(self, named: str | None) -> str | None:
        """Where the tokenizer of the hub is: beside a local model when its files are there, else as the config says."""
        if named and self.scheme == "local-dir" and (Path(self.place) / "tokenizer.json").is_file():
            return self.place
        return named


def parse_source(name: str) -> Source:
    """Take a model's name apart. ValueError for an empty one."""
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"model name is {name!r}: give one of open_clip.list_models(), hf-hub:REPO or local-dir:FOLDER"
        )
    for scheme in _SCHEMES:
        if name.startswith(scheme):
            place = name[len(scheme) :]
            if not place:
                raise ValueError(f'model "{name}" names no {"repository" if scheme == "hf-hub:" else "folder"}')
            return Source(scheme.removesuffix(":"), place)
    return Source("", name)
