"""pacd-fast certify: certificates of a data set's images, in a file that is resumed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pacd_fast.arguments import number, whole_number
from pacd_fast.certification import Selection, certify_dataset
from pacd_fast.cli.flags import add_data, add_device, device_of, load_data
from pacd_fast.data import Dataset
from pacd_fast.networks import BUILT_IN, Checkpoint, load_checkpoint


def add_checkpoint(sub: argparse.ArgumentParser, **more: Any) -> None:
    """--checkpoint, and what it may not say itself."""
    sub.add_argument(
        "--checkpoint", required=True, **{"help": "our .safetensors, a state_dict, or locuslab's checkpoint", **more}
    )
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
    add_checkpoint(sub)
    add_data(sub)
    sub.add_argument("--split", choices=["test", "train", "val"], default="test")
    sub.add_argument("--sigma", type=number, help="noise level; by default what the checkpoint was trained with")
    sub.add_argument("--n0", type=whole_number, default=100, help="selection samples per image")
    sub.add_argument("--n", type=whole_number, default=100_000, help="estimation samples per image")
    sub.add_argument("--alpha", type=number, default=0.001, help="failure probability of each certificate")
    sub.add_argument("--skip", type=whole_number, default=1, help="certify the images whose index it divides")
    sub.add_argument("--max", type=whole_number, help="stop before this image")
    sub.add_argument("--target-class", help="only images of this class, its name or number")
    sub.add_argument("--images", type=whole_number, nargs="+", help="only these images, by index")
    sub.add_argument("--except-class", help="only images of other classes")
    sub.add_argument("--count", type=whole_number, help="a random choice of this many images, decided by --choice")
    sub.add_argument("--choice", type=whole_number, default=0, help="seed of --count's choice")
    sub.add_argument("--shard", default="0/1", help="i/m: every m-th image, from the i-th; see merge")
    sub.add_argument("--seed", type=whole_number, help="of the noise; by default from the operating system's entropy")
    sub.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="the certificate is for the model in it"
    )
    add_device(sub)
    sub.add_argument("--batch-size", type=whole_number, help="rows a forward pass; measured where it is not given")
    sub.add_argument("--out", required=True, help="results file (.tsv)")


def _shard(text: str) -> tuple[int, int]:
    try:
        shard, shards = (int(part) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"--shard must be i/m like 0/2, not {text!r}") from None
    return shard, shards


def run(options: argparse.Namespace) -> None:
    device, data = device_of(options.device), load_data(options)
    if not 0 <= options.choice < 2**32:
        raise ValueError(f"--choice must be in [0, 2^32), not {options.choice}")
    shard = _shard(options.shard)
    if shard[1] > 1 and options.seed is None and not Path(options.out).exists():
        raise ValueError("shards are merged only where they have one seed: give them the same --seed")
    target, others = (
        None if text is None else data.class_index(text) for text in (options.target_class, options.except_class)
    )
    images = None if options.images is None else tuple(options.images)
    selection = Selection(target, others, images, options.count, options.choice, options.skip, options.max, shard)
    certify_dataset(
        checkpoint_for(options.checkpoint, options, data),
        data,
        options.split,
        selection.indices(data.split(options.split)[1]),
        options.out,
        sigma=options.sigma,
        n0=options.n0,
        n=options.n,
        alpha=options.alpha,
        seed=options.seed,
        dtype=options.dtype,
        device=device,
        batch_size=options.batch_size,
        progress=True,
    )
