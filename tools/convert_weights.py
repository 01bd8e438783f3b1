"""Write a checkpoint in another layout, so that a model trained here loads in other programs.

Examples:
    python tools/convert_weights.py --model EVA02-CLIP-B-16 clipself.pt openclip.safetensors --layout timm
    python tools/convert_weights.py --model ViT-B-16-quickgelu open_clip.safetensors reference.pt --layout openai
    python tools/convert_weights.py --model EVA02-CLIP-B-16 declip.pt declip.safetensors --readout csa
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from open_clip.factory import add_model_config, build_model, get_model_config, list_models
from open_clip.readouts import SPEC_KEY
from open_clip.weight_files import save_weights
from open_clip.weights import LAYOUTS, export_state_dict, load_weights, without_reading
from training.engine.errors import UserError, as_user_error, run_program
from training.engine.flags import PATH, Parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=PATH, help="checkpoint in any layout (.pt, .bin, .safetensors)")
    parser.add_argument("target", type=PATH, help="file to write (.safetensors or .pt)")
    parser.add_argument("--model", required=True, help="name of the model, or the path of its config json")
    parser.add_argument(
        "--layout",
        choices=(*LAYOUTS, "reference"),
        default="reference",
        help="eva: EVA-CLIP and the published code's EVA models; openai: OpenAI and OpenCLIP ViTs; timm: OpenCLIP with "
        "a timm trunk; reference (default): whichever of eva and openai the model has",
    )
    parser.add_argument(
        "--readout",
        metavar="NAME",
        help="dense reading to write down beside the weights, for files that do not say by which they were trained "
        "(DeCLIP's released ones: csa or qq). By default what the source says. Programs that load strictly refuse "
        "such an entry: --readout none leaves it out, with weights that the reading alone has; whoever reads the file "
        "must then know",
    )
    parser.add_argument("--half", action="store_true", help="store float16 weights")
    parser.add_argument("--force", action="store_true", help="replace an existing target")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The program; see :func:`~training.engine.errors.run_program` for its exit status."""
    return run_program(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    args = parse_args(argv)
    with as_user_error():
        name = args.model
        if name.endswith(".json"):
            name = Path(args.model).stem
            add_model_config(args.model, name)
        config = get_model_config(name)
        if config is None:
            raise UserError(f'model "{name}" is unknown: use one of {", ".join(list_models())}, or a config file')
        if args.target.exists() and not args.force:
            raise UserError(f"{args.target} exists: choose another name or add --force")
        model = build_model(config)
        load_weights(model, args.source)
        if args.readout not in (None, "none"):
            model.visual.set_readout(args.readout)
        state = export_state_dict(model, None if args.layout == "reference" else args.layout)
        state, lost = (without_reading(state) if args.readout == "none" else (state, []))
        if args.half:
            state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
        save_weights(state, args.target, name)
    print(f"{args.target}: {len(state)} tensors, {args.target.stat().st_size / 1e6:.1f} MB")
    if SPEC_KEY in state:
        print(f"the file names its dense reading, {model.visual.readout.name}; for programs that load strictly, add "
              "--readout none")  # fmt: skip
    elif lost:
        print(f"left out: {', '.join(lost)}; read it by {model.visual.readout.name} elsewhere")


if __name__ == "__main__":
    sys.exit(main())
