"""The ranking's start model as a small file, so that every ranking begins from the same one.

    python benchmarks/ranking_start.py --ranking ranking --out benchmarks/ranking_start.safetensors

Training it takes a tenth of a ranking's time, and another machine's is rarely the same to the last bit. Kept in
float16, and of the token embedding, two thirds of the weights, only the rows of tokens that occur in a caption or a
class prompt of the scenes; the others become 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "src")]
import torch  # noqa: E402
from ranking_rows import MODEL  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from open_clip import get_tokenizer  # noqa: E402
from open_clip.prompts import class_prompts  # noqa: E402
from training.engine.checkpoint import weights_hash  # noqa: E402

FILE = Path(__file__).resolve().parent / "ranking_start.safetensors"
ROWS = "rows"  # how many tokens there are, then the numbers of those that were kept


def texts_of(data: Path) -> list[str]:
    """All captions and class prompts of a ranking's data folder."""
    captions = json.loads((data / "pairs.json").read_text())["annotations"]
    names = [c["name"] for c in json.loads((data / "names.json").read_text())]
    return [c["caption"] for c in captions] + [prompt for name in names for prompt in class_prompts(name)]


def weights_of(file: Path) -> str:
    """Fingerprint of released weights."""
    return weights_hash(torch.load(file, map_location="cpu", weights_only=True)["state_dict"])[:16]


def tokens_of(state: dict[str, Tensor]) -> str:
    """Name of the token embedding, which differs between a model and released weights."""
    (name,) = (n for n in state if n.endswith("token_embedding.weight"))
    return name


def pack(state: dict[str, Tensor], texts: Iterable[str]) -> dict[str, Tensor]:
    """Weights in float16, with the rows of the token embedding that these texts need and their numbers."""
    tokens, rows = tokens_of(state), get_tokenizer(MODEL)(list(texts)).unique()
    packed = {n: (t[rows] if n == tokens else t).contiguous() for n, t in state.items()}
    packed = {n: t.half() if t.is_floating_point() else t for n, t in packed.items()}
    return packed | {ROWS: torch.cat([torch.tensor([len(state[tokens])]), rows]).int()}


def unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict in float32; rows of the token embedding that were not kept are 0."""
    state = {n: t.float() if t.is_floating_point() else t for n, t in packed.items() if n != ROWS}
    tokens, (vocabulary, *rows) = tokens_of(state), packed[ROWS].tolist()
    whole = torch.zeros(vocabulary, state[tokens].shape[1])
    whole[torch.tensor(rows)] = state[tokens]
    return state | {tokens: whole}


def write_start(file: Path, out: Path) -> None:
    """Unpack a start model into weights for ``--pretrained``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_suffix(".unfinished")
    torch.save({"state_dict": unpack(load_file(file))}, unfinished)
    unfinished.replace(out)


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranking", required=True, type=Path, help="folder of a ranking whose start model is trained")
    parser.add_argument("--out", type=Path, default=FILE, help=f"file to write ({FILE.name} beside this program)")
    args = parser.parse_args(argv)
    trained = args.ranking / "logs/start/checkpoints/clipself.pt"
    if not trained.is_file():
        raise SystemExit(f"error: {trained} is not there: run benchmarks/methods.py --out {args.ranking} --start train")
    state = torch.load(trained, map_location="cpu", weights_only=True)["state_dict"]
    save_file(pack(state, texts_of(args.ranking / "data")), args.out)
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
