"""The ensemble alpha * student + (1 - alpha) * start model, of any epoch and with any alpha.

Training writes it to clipself.pt with its own --alpha; epoch_N.pt is the student alone.

Examples:
    python tools/ensemble_weights.py --model EVA02-CLIP-B-16 logs/mine/checkpoints/epoch_3.pt \\
        checkpoints/EVA02_CLIP_B_psz16_s8B.pt epoch_3_ensemble.pt --alpha 0.7
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from open_clip.factory import build_model, get_model_config, list_models
from open_clip.weight_files import save_weights
from open_clip.weights import LAYOUTS, export_state_dict, load_weights
from training.engine.errors import UserError, as_user_error, run_program
from training.engine.flags import PATH, SHARE, Parser
from training.ensemble import ensemble_state
from training.models import model_name


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The program's arguments."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=PATH, help="checkpoint of the trained model, in any layout")
    parser.add_argument("start", type=PATH, help="checkpoint of the model that its training started from")
    parser.add_argument("target", type=PATH, help="file to write (.pt or .safetensors)")
    parser.add_argument("--model", required=True, help="name of the model, or the path of its config json")
    parser.add_argument("--alpha", type=SHARE, required=True, help="share of the student, from 0 to 1")
    parser.add_argument("--layout", choices=(*LAYOUTS, "reference"), default="reference", help="names of the tensors")
    parser.add_argument("--force", action="store_true", help="replace an existing target")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> str:
    """Write the ensemble; what was written, in words.

    Raises:
        UserError: a file that is missing or of another model, or a target that exists.
    """
    if args.target.exists() and not args.force:
        raise UserError(f"{args.target} exists: choose another name or add --force")
    if args.student.resolve() == args.start.resolve():
        raise UserError(f"{args.student} is given twice: give the student, then the model that it started from")
    name = model_name(args.model)
    config = get_model_config(name)
    if config is None:
        raise UserError(f'model "{name}" is unknown: use one of {", ".join(list_models())}, or a config file')
    with as_user_error():
        student, start = build_model(config), build_model(config)
        load_weights(student, args.student)
        # Of one reading, whose own weights the start model has as they are at first: as the run itself mixes them.
        start.visual.adopt_readout(student.state_dict(), str(args.student))
        load_weights(start, args.start)
        state = ensemble_state(student.state_dict(), start.state_dict(), args.alpha)
        state = export_state_dict(student, None if args.layout == "reference" else args.layout, state=state)
        save_weights(state, args.target, name)
    return f"{len(state)} tensors, {args.alpha:g} x {args.student} + {1 - args.alpha:g} x {args.start}"


def main(argv: Sequence[str] | None = None) -> int:
    """The program; see :func:`~training.engine.errors.run_program` for its exit status."""
    return run_program(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> None:
    args = parse_args(argv)
    print(f"{args.target}: {run(args)}")


if __name__ == "__main__":
    sys.exit(main())
