"""Write a GLIP checkpoint in another layout: the published one, MMDetection's, or this program's own.

Every parameter must be there in its shape, and none may be left over; nothing is written otherwise.

Examples:
    python tools/convert_glip.py glip_tiny_model_o365_goldg_cc_sbu.pth glip_t.pt --config GLIP/configs/glip_t.toml
    python tools/convert_glip.py runs/glip/last.pt for_mmdet.pth --config GLIP/configs/glip_t.toml --layout mmdet
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ovdet.glip import files, names
from ovdet.glip.assemble import load_model, read_config
from training.engine.checkpoint import save_atomically
from training.engine.errors import UserError, run_program
from training.engine.flags import PATH, Parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=PATH, help="checkpoint in any layout (.pth, .pt, .safetensors)")
    parser.add_argument("target", type=PATH, help="file to write (.pth or .pt)")
    parser.add_argument("overrides", nargs="*", help="config values: section.key=value")
    parser.add_argument("--config", required=True, help="the variant: one of GLIP/configs/*.toml, or your own")
    parser.add_argument(
        "--layout", choices=names.LAYOUTS, default="own",
        help="glip: as published; mmdet: MMDetection's; own (default): this program's",
    )  # fmt: skip
    parser.add_argument("--ema", action="store_true", help="take the averaged weights of the source (model_ema)")
    parser.add_argument("--force", action="store_true", help="replace an existing target")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert. UserError for faulty input."""
    args = parse_args(argv)
    if args.target.exists() and not args.force:
        raise UserError(f"{args.target} exists: choose another name or add --force")
    if not args.target.parent.is_dir():
        raise UserError(f"{args.target}: the folder {args.target.parent} does not exist: make it first")
    config = read_config(args.config, args.overrides)
    # A file that holds only what was trained becomes a whole one, with the weights that it was trained on.
    model = load_model(config, args.source, ema=args.ema)
    if args.layout == "own":
        content = files.content_of(model, config)
    else:
        state = names.write_state(model.state_dict(), args.layout, fusion=config.head.fusion)
        content = {"state_dict": state} if args.layout == "mmdet" else {"model": _as_published(state)}
    save_atomically(content, args.target)
    print(f"{args.target}: {len(model.state_dict())} tensors in {args.layout} layout")
    return 0


def _as_published(state: dict) -> dict:
    """The names that the reference's loader looks for."""
    return {f"module.{name}": value for name, value in state.items()}


if __name__ == "__main__":
    sys.exit(run_program(main))
