"""Class-agnostic proposals without annotations: what a vision foundation model holds together.

    pip install -e ".[proposals]"
    python -m training.propose --images annotations/instances_train2017.json --image-root train2017 --out proposals.json
    python -m training.main --dataset-type mixed_distill --train-data proposals.json --train-image-root train2017 ...

The cells of the model's map are merged with their neighbours, likest first (Ward's linkage), into a tree. Cut from its
root on, it gives 2, 3, 4, ... regions; each that appears is a proposal, earlier ones first, unless it touches too many
sides of the image, as background does, or is nearly an earlier one. ``--images`` is a folder, or a COCO or LVIS json
whose image ids are kept; its annotations are not looked at. torchrun shares the work among processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import write_jpeg
from torchvision.ops import nms
from torchvision.utils import draw_bounding_boxes
from tqdm import tqdm

from open_clip.transform import normalize, resize
from training.data.prepare import View
from training.engine.data.boxes_file import boxes_file
from training.engine.data.folder import list_images
from training.engine.data.images import ImageError, read_image, resolve
from training.engine.data.samples import Skipped
from training.engine.data.workers import Loader, start_worker
from training.engine.distributed import Dist, all_reduce_sum, gather_to_master, init_distributed, together
from training.engine.errors import UserError, run_program
from training.engine.files import check_writable, write_json
from training.engine.flags import COUNT, NATURAL, PATH, SHARE, Parser
from training.engine.journal import setup_logging
from training.engine.pictures import distinct_colours
from training.engine.precision import make_precision
from training.engine.skips import SkipPolicy
from training.teachers.build import Teacher, foundation_model
from training.teachers.describe import TeacherSpec, VisionTeacherFlags

LARGEST = 0.9  # share of the image that a proposal covers at most: the whole image is none
AHEAD = 4  # maps that wait for each process that merges them


def merge_tree(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Regions of a map, merged two by two until one is left: Ward's linkage between neighbours.

    Args:
        cells: features ``[h, w, D]``; their directions count, not their lengths.

    Returns:
        (boxes, areas, heights) of the ``2 h w - 1`` regions, single cells first and the whole map last: xyxy in 0..1,
        shares of the map, and how unlike its brother each was when the two were merged, as a share of the last merger;
        1 for the whole map.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import AgglomerativeClustering
        from sklearn.feature_extraction.image import grid_to_graph
    except ImportError:
        raise UserError('proposals need scikit-learn: pip install -e ".[proposals]"') from None
    height, width, _ = cells.shape
    flat = cells.reshape(height * width, -1).astype(np.float64)
    flat = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
    number = len(flat)
    top, left = np.divmod(np.arange(number), width)
    boxes = np.zeros((2 * number - 1, 4))
    boxes[:number] = np.stack([left, top, left + 1, top + 1], axis=1)
    areas, heights = np.ones(2 * number - 1), np.ones(2 * number - 1)
    if number > 1:
        tree = AgglomerativeClustering(
            n_clusters=1, linkage="ward", connectivity=grid_to_graph(height, width), compute_distances=True
        ).fit(flat)
        last = max(float(tree.distances_.max()), 1e-12)
        for merged, (pair, distance) in enumerate(zip(tree.children_, tree.distances_, strict=True), number):
            boxes[merged, :2], boxes[merged, 2:] = boxes[pair, :2].min(0), boxes[pair, 2:].max(0)
            areas[merged], heights[pair] = areas[pair].sum(), distance / last
    return boxes / np.array([width, height, width, height]), areas / number, heights


def propose(
    cells: np.ndarray, *, most: int, smallest: float, iou: float, sides: int, least: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Proposals of one image, best first.

    Args:
        cells: features ``[h, w, D]``.
        most: proposals at most.
        smallest: share of the image that one covers at least.
        iou: two boxes overlap by at most so much, 0..1.
        sides: sides of the image that one touches at most.
        least: score that one has at least.

    Returns:
        (boxes ``[K, 4]``, xyxy in 0..1; scores ``[K]`` in 0..1, see :func:`merge_tree`).
    """
    boxes, areas, heights = merge_tree(cells)
    touched = np.isclose(boxes, [0, 0, 1, 1]).sum(1)
    fitting = (areas >= smallest) & (areas <= LARGEST) & (touched <= sides)
    usable = np.flatnonzero(fitting & (heights >= least))
    boxes, scores = boxes[usable], heights[usable]
    kept = nms(torch.from_numpy(boxes), torch.from_numpy(scores), iou)[:most].numpy()
    return boxes[kept], scores[kept]


class Squares(Dataset):
    """Images stretched to squares: ``index``, ``original`` (height, width) and ``image`` uint8 ``[3, side, side]``."""

    def __init__(self, names: Sequence[str], root: str, rows: range, side: int) -> None:
        self.names, self.root, self.rows, self.side = names, root, rows, side

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> dict[str, Any] | Skipped:
        index = self.rows[item]
        try:
            image = read_image(resolve(self.root, self.names[index]))
        except ImageError as error:
            return Skipped(error.file, error.reason)
        return {"index": index, "original": tuple(image.shape[-2:]), "image": resize(image, self.side, self.side)}


def build_model(name: str, weights: str, cells: int, device: torch.device, dtype: torch.dtype) -> Teacher:
    """The foundation model, for images stretched to squares of ``cells`` x ``cells`` of its patches."""
    spec = TeacherSpec("vfm", "timm", model=name, weights=weights)
    model, mean, std = foundation_model(spec)
    teacher = Teacher(spec, model, View("images", 0, tuple(mean), tuple(std), dtype))
    teacher.view = replace(teacher.view, size=cells * teacher.patch_size)
    return teacher.to(device, dtype)


def find(
    names: Sequence[str], root: str, teacher: Teacher, *, dist: Dist, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Proposals of this process's share of the images. UserError where too many of these cannot be read."""
    squares = Squares(names, root, range(dist.rank, len(names), dist.world_size), teacher.view.size)
    policy = SkipPolicy(f"--images {args.images}", args.max_skipped)
    loader = Loader(squares, workers=args.workers, batch_size=args.batch_size, collate_fn=list)
    settings = {"most": args.most, "smallest": args.smallest, "iou": args.iou, "sides": args.sides}
    merge = partial(propose, **settings, least=args.least_score)
    bar = tqdm(total=len(squares), desc="proposals", unit="img", disable=not dist.is_master, mininterval=1)
    for (index, (height, width)), (boxes, scores) in in_order(
        mapped(loader, policy, teacher, dist.device), merge, args.workers
    ):
        boxes = boxes * np.array([width, height, width, height])
        yield {"index": index, "original": (height, width), "boxes": boxes, "scores": scores}
        bar.update()
    bar.update(policy.skipped)
    bar.close()
    counts = all_reduce_sum(torch.tensor([policy.usable, policy.skipped], dtype=torch.float64, device=dist.device))
    policy.usable, policy.skipped = counts.tolist()
    policy.judge(at_end=True)


def mapped(
    loader: Loader, policy: SkipPolicy, teacher: Teacher, device: torch.device
) -> Iterator[tuple[tuple[int, tuple[int, int]], np.ndarray]]:
    """((index, (height, width)), features ``[h, w, D]``) of each usable image."""
    for samples in loader:
        usable = [s for s in samples if not isinstance(s, Skipped)]
        policy.name(s for s in samples if isinstance(s, Skipped))
        policy.count(len(usable), len(samples) - len(usable))
        for sample, cells in zip(usable, maps_of([s["image"] for s in usable], teacher, device), strict=True):
            yield (sample["index"], sample["original"]), cells


def in_order(tasks: Iterable[tuple[Any, np.ndarray]], call: Any, workers: int) -> Iterator[tuple[Any, Any]]:
    """(label, ``call(array)``) of each task, in their order.

    Merging a map of 32 x 32 cells takes some 0.06 s of a core, two hours for the images of COCO, so processes share it.

    Args:
        tasks: (label, array).
        workers: processes that call; 0 for this one.

    Raises:
        UserError: one of them was ended.
    """
    if not workers:
        yield from ((label, call(array)) for label, array in tasks)
        return
    waiting: deque = deque()
    context = multiprocessing.get_context("forkserver")  # not forked from here, where a GPU may be in use
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(0,)) as pool:
        try:
            for label, array in tasks:
                waiting.append((label, pool.submit(call, array)))
                if len(waiting) > AHEAD * workers:
                    label, future = waiting.popleft()
                    yield label, future.result()
            yield from ((label, future.result()) for label, future in waiting)
        except BrokenProcessPool:
            raise UserError(
                "a process that finds proposals was ended, most likely for want of memory: lower --workers"
            ) from None


def maps_of(images: list[Tensor], teacher: Teacher, device: torch.device) -> np.ndarray:
    """Features ``[B, h, w, D]`` of uint8 images of one size, float32."""
    if not images:
        return np.zeros((0, 1, 1, 1), np.float32)
    view = teacher.view
    pixels = normalize(torch.stack(images).to(device, non_blocking=True), view.mean, view.std, view.dtype)
    return teacher(pixels).float().permute(0, 2, 3, 1).cpu().numpy()


def draw(found: Sequence[dict[str, Any]], names: Sequence[str], root: str, out: Path, number: int) -> int:
    """Pictures of the proposals of ``number`` images, evenly spread, as ``out / NAME.jpg``; their number."""
    rows = np.unique(np.linspace(0, len(found) - 1, min(number, len(found))).round().astype(int))
    out.mkdir(parents=True, exist_ok=True)
    for image in (found[row] for row in rows):
        name, boxes = names[image["index"]], torch.from_numpy(image["boxes"])
        picture = read_image(resolve(root, name)).contiguous()
        if len(boxes):
            colours = [tuple(c) for c in distinct_colours(len(boxes)).tolist()]
            picture = draw_bounding_boxes(picture, boxes, colors=colours, width=max(1, max(picture.shape[-2:]) // 150))
        write_jpeg(picture, str(out / f"{name.replace('/', '_')}.jpg"))
    return len(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write the file. UserError for faulty input."""
    own = VisionTeacherFlags()
    parser = Parser(
        prog="python -m training.propose", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=PATH, required=True, help="a folder, or a COCO or LVIS json")
    add("--image-root", default="", help="folder or URL of the json's images")
    add("--out", type=PATH, required=True, help="file to write, in COCO's layout")
    add("--vfm", default=own.vfm, metavar="TRUNK", help=f"timm trunk that is the foundation model ({own.vfm})")
    add("--vfm-weights", default="", metavar="FILE", help='its file, or "random"; by default timm\'s')
    add("--cells", type=COUNT, default=32, help="cells along a side of its map (32); an image is stretched to a square")
    add("--most", type=COUNT, default=10, help="proposals an image (10)")
    add("--smallest", type=SHARE, default=0.01, help="share of the image that a proposal covers at least (0.01)")
    add("--iou", type=SHARE, default=0.7, help="largest overlap of two proposals (0.7)")
    add("--sides", type=NATURAL, default=1, help="sides of the image that a proposal touches at most (1)")
    add("--least-score", type=SHARE, default=0.0, help="how unlike its surroundings a proposal is at least, 0..1 (0)")
    add("--pictures", type=NATURAL, default=0, metavar="N", help="draw the proposals of N images beside the file (0)")
    add("--max-skipped", type=SHARE, default=0.1, help="share of unreadable images that is put up with (0.1)")
    add("--batch-size", type=COUNT, default=16, help="images at a time (16)")
    add("--workers", type=NATURAL, default=4, help="processes that read images, and as many that merge cells (4)")
    add("--precision", choices=("fp32", "amp_bf16"), help="default: bfloat16 on a GPU that has it")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    args = parser.parse_args(argv)
    dist = init_distributed(args.device)
    setup_logging(dist.rank)
    with together():
        if dist.is_master:
            check_writable(args.out, "--out")
        ids, names, root = list_images(args.images, args.image_root)
        merge_tree(np.ones((1, 2, 1)))  # scikit-learn is asked for before anything is read
        dtype = make_precision(args.precision, dist.device).input_dtype
        teacher = build_model(args.vfm, args.vfm_weights, args.cells, dist.device, dtype)
    parts = gather_to_master(list(find(names, root, teacher, dist=dist, args=args)))
    if parts is None:
        return
    found = sorted((image for part in parts for image in part), key=lambda image: image["index"])
    content = boxes_file(found, ids, names, ["object"], unannotated=True)
    write_json(args.out, content)
    print(f"{args.out}: {len(content['images'])} images, {len(content['annotations'])} boxes")
    if args.pictures:
        folder = args.out.with_name(f"{args.out.stem}_pictures")
        print(f"{folder}: {draw(found, names, root, folder, args.pictures)} pictures")


if __name__ == "__main__":
    sys.exit(run_program(main))
