"""pacd-fast certify, predict, verify: a data set's images certified into a file, predicted, a file checked."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch

from pacd_fast.arguments import number, whole_number
from pacd_fast.certification import (
    ABSTAIN,
    Certify,
    Selection,
    certify_dataset,
    predict_dataset,
    read_results,
    redraw,
    verify,
)
from pacd_fast.cli.flags import add_choice, add_data, add_device, add_fields, add_out, device_of, given, load_data
from pacd_fast.data import Dataset, random_subset
from pacd_fast.networks import BUILT_IN, Checkpoint, load_checkpoint
from pacd_fast.ranks import Ranks


def add_checkpoint(sub: argparse.ArgumentParser, **more: Any) -> None:
    """--checkpoint, and what it may not say itself."""
    text = "our .safetensors, a state_dict, or locuslab's checkpoint"
    sub.add_argument("--checkpoint", **{"required": True, "help": text, **more})
    networks = f"{', '.join(BUILT_IN)} or package.module:function"
    sub.add_argument("--model", help=f"where the checkpoint does not say it: {networks}")
    sub.add_argument("--num-classes", type=whole_number, help="where neither the checkpoint nor the data say it")
    for name in ("mean", "std"):
        sub.add_argument(
            f"--{name}", type=number, nargs="+", metavar="X",
            help=f"{name} a channel of the normalisation in front, where the checkpoint does not hold it; by default "
            "none, and CIFAR-10's for locuslab's files",
        )  # fmt: skip


def checkpoint_for(path: str, options: argparse.Namespace, data: Dataset) -> Checkpoint:
    """A checkpoint of the command line that fits the data; says what was done to make it fit."""
    num_classes = options.num_classes
    if num_classes is None and len(data.x_train):  # test images alone may not be of every class
        num_classes = data.num_classes
    found = load_checkpoint(
        path,
        arch=options.model,
        num_classes=num_classes,
        in_channels=data.in_channels,
        image_size=data.image_size,
        mean=options.mean,
        std=options.std,
    )
    if found.num_classes < data.num_classes:
        raise ValueError(f"{path} knows {found.num_classes} classes, and the images are of {data.num_classes}")
    for note in found.notes:
        print(f"{path}: {note}", file=sys.stderr)
    return found


def add_commands(add: Any) -> None:
    sub = add("certify", run, "certify the images of a split; run again, it resumes")
    _add_images(sub)
    sub.add_argument("--shard", default="0/1", help="i/m: every m-th image, from the i-th; see merge")
    text = "under torchrun: images are handed out to its processes, or for few images and large n each one's samples"
    sub.add_argument("--share", choices=["images", "samples"], default="images", help=text)
    add_fields(sub, Certify)
    sub.add_argument("--out", required=True, help="results file (.tsv)")
    sub = add("predict", run_predict, "what the smoothed classifier says, with as few samples as that takes")
    _add_images(sub)
    add_fields(sub, Certify, skip=("radii", "tolerance", "sides"))
    add_out(sub, "a new file (.tsv)")
    sub = add("verify", run_verify, "recompute every certificate of a results file; draw the noise again for some")
    sub.add_argument("file")
    add_checkpoint(sub, required=False, help="with it, the votes of some images are drawn again and compared")
    add_data(sub)
    sub.add_argument("--split", choices=["test", "train", "val"], default="test")
    sub.add_argument("--images", type=whole_number, default=5, help="how many, a random choice")
    sub.add_argument("--fraction", type=number, help="or which share of them")
    add_choice(sub, "seed of the choice")
    add_device(sub)


def _add_images(sub: argparse.ArgumentParser) -> None:
    """What to certify or predict, and with which model."""
    add_checkpoint(sub)
    add_data(sub)
    sub.add_argument("--split", choices=["test", "train", "val"], default="test")
    sub.add_argument("--skip", type=whole_number, default=1, help="only images 0, SKIP, 2 SKIP, ...")
    sub.add_argument("--max", type=whole_number, help="stop before this image")
    sub.add_argument("--target-class", help="only images of this class, its name or number")
    sub.add_argument("--images", type=whole_number, nargs="+", help="only these images, by index")
    sub.add_argument("--except-class", help="only images of other classes")
    sub.add_argument("--count", type=whole_number, help="a random choice of this many images, decided by --choice")
    add_choice(sub, "seed of --count's choice")
    add_device(sub)


def _shard(text: str) -> tuple[int, int]:
    try:
        shard, shards = (int(part) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"--shard must be i/m like 0/2, not {text!r}") from None
    return shard, shards


def _chosen(options: argparse.Namespace, data: Dataset, shard: tuple[int, int] = (0, 1)) -> list[int]:
    """Indices of the images that a command line asks for."""
    target, others = (
        None if text is None else data.class_index(text) for text in (options.target_class, options.except_class)
    )
    images = None if options.images is None else tuple(options.images)
    selection = Selection(target, others, images, options.count, options.choice, options.skip, options.max, shard)
    return selection.indices(data.split(options.split)[1])


def run(options: argparse.Namespace) -> None:
    device, data = device_of(options.device), load_data(options)
    shard = _shard(options.shard)
    if shard[1] > 1 and options.seed is None and not Path(options.out).exists():
        raise ValueError("shards are merged only where they have one seed: give them the same --seed")
    certify_dataset(
        checkpoint_for(options.checkpoint, options, data),
        data,
        options.split,
        _chosen(options, data, shard),
        options.out,
        Certify(**given(Certify, options)),
        shards=shard[1],
        ranks=Ranks.of_torchrun(),
        share=options.share,
        device=device,
        progress=True,
    )
    if Ranks.of_torchrun().rank == 0:
        rows = read_results(options.out)
        abstained = int((rows.predict == ABSTAIN).sum())
        print(f"{options.out}: {len(rows)} images, {abstained} abstained; pacd-fast summary {options.out} shows them")


def run_predict(options: argparse.Namespace) -> None:
    device, data = device_of(options.device), load_data(options)
    chosen = _chosen(options, data)
    right, abstained, samples = predict_dataset(
        checkpoint_for(options.checkpoint, options, data), data, options.split, chosen, options.out,
        Certify(**given(Certify, options)), force=options.force, device=device, progress=True,
    )  # fmt: skip
    count = len(chosen)
    print(f"{options.out}: {right / count:.2%} right, {abstained} of {count} abstained, {samples:.0f} samples an image")


def run_verify(options: argparse.Namespace) -> int:
    count, problems = verify(options.file)
    for problem in problems[:10]:
        print(f"{options.file}: {problem}", file=sys.stderr)
    if problems:
        print(f"{options.file}: {len(problems)} of {count} rows do not follow from their votes", file=sys.stderr)
        return 1
    print(f"{options.file}: {count} rows follow from their votes")
    if options.checkpoint is None:
        return 0
    device, data = device_of(options.device), load_data(options)
    known = read_results(options.file).idx
    wanted = options.images if options.fraction is None else math.ceil(options.fraction * len(known))
    if not 1 <= wanted <= len(known):
        raise ValueError(f"between 1 and {len(known)} images can be drawn again, not {wanted}")
    images = sorted(int(known[i]) for i in random_subset(torch.zeros(len(known)), None, wanted, options.choice))
    checkpoint = checkpoint_for(options.checkpoint, options, data)
    different = 0
    for idx, difference in redraw(options.file, checkpoint, data, options.split, images, device=device, progress=True):
        if difference is not None:
            different += 1
            print(f"{options.file}: image {idx}: {difference}", file=sys.stderr)
    if different:
        return 1
    print(f"{options.file}: {wanted} rows have the votes of noise drawn again: images {' '.join(map(str, images))}")
    return 0
