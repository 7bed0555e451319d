"""Flags from the fields of dataclasses, and what several commands share: data, device, help."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Collection, Mapping
from typing import Any

import torch

from pacd_fast import ops
from pacd_fast.arguments import NotANumber, number, whole_number
from pacd_fast.data import NAMES, Dataset, load_dataset
from pacd_fast.ranks import Ranks


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is None or action.default is False or action.default in ((), [])
        return action.help if none else super()._get_help_string(action)


def add_fields(
    parser: argparse._ActionsContainer,
    settings: type,
    *,
    skip: Collection[str] = (),
    optional: bool = False,
    defaults: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """A flag for every field of a dataclass: its name with hyphens, its type, default and help text (see `option`).

    skip: fields that are set otherwise; optional: no default, so that None says that a flag was not given; defaults,
    texts: instead of the fields' own.
    """
    for field in dataclasses.fields(settings):
        if field.name in skip:
            continue
        kind = str(field.type)
        default = None if optional else (defaults or {}).get(field.name, field.default)
        text = (texts or {}).get(field.name, field.metadata.get("help"))
        flag = "--" + field.metadata.get("flag", field.name).replace("_", "-")
        more: dict[str, Any] = {"dest": field.name, "default": default, "help": text and text.replace("%", "%%")}
        if kind == "bool" and not optional:
            parser.add_argument(flag, action="store_true", **more)
            continue
        if kind in ("bool", "bool | None"):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **more)
            continue
        if kind.startswith("tuple["):
            more["nargs"] = "*"
            kind = kind.removeprefix("tuple[").partition(",")[0]
        more["type"] = {"int": whole_number, "float": number}.get(kind.removesuffix(" | None"), str)
        for name in ("choices", "metavar"):
            if name in field.metadata:
                more[name] = field.metadata[name]
        parser.add_argument(flag, **more)


def given(settings: type, options: argparse.Namespace, skip: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass that are there on a command line and not None; lists as tuples."""
    values = {f.name: getattr(options, f.name, None) for f in dataclasses.fields(settings) if f.name not in skip}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if v is not None}


def add_data(parser: argparse._ActionsContainer, held_out: int | None = 0) -> None:
    """--data and what goes with it; held_out: the default of --validation, None where the command decides it."""
    parser.add_argument("--data", default="mnist5k", help=f"{', '.join(NAMES)} or the path of an .npz file")
    parser.add_argument("--data-dir", help="folder of mnist, fashion-mnist, cifar10 in torchvision's layout")
    parser.add_argument("--download", action="store_true", help="fetch the data into --data-dir where it is missing")
    parser.add_argument(
        "--validation", type=whole_number, default=held_out, help="last training images to hold out as split val"
    )
    parser.add_argument(
        "--train-images", type=whole_number, help="keep this many training images, the first ones; by default all"
    )


def load_data(options: argparse.Namespace, validation: int | None = None, train_images: int | None = None) -> Dataset:
    """What a command line asks for; validation, train_images: where it does not say."""
    return load_dataset(
        options.data,
        data_dir=options.data_dir,
        download=options.download,
        validation=(validation or 0) if options.validation is None else options.validation,
        train_images=train_images if options.train_images is None else options.train_images,
    )


def add_out(parser: argparse._ActionsContainer, text: str) -> None:
    """--out, and --force without which nothing is overwritten; see `files.claimed`."""
    parser.add_argument("--out", required=True, help=text)
    parser.add_argument("--force", action="store_true", help="write --out anew where it is there already")


def add_choice(parser: argparse._ActionsContainer, text: str) -> None:
    """--choice, the seed of a random choice of images (see `data.random_subset`)."""

    def seed(word: str) -> int:
        if not 0 <= (value := whole_number(word)) < 2**32:
            raise NotANumber(f"must be in [0, 2^32), not {value}")
        return value

    parser.add_argument("--choice", type=seed, default=0, help=text)


def add_device(parser: argparse._ActionsContainer, default: str = "auto") -> None:
    parser.add_argument("--device", default=default, help="cpu, cuda, cuda:1 ...; auto takes CUDA where it works")


def device_of(name: str) -> torch.device:
    """cpu, cuda, cuda:i, or auto: CUDA where a device and our operators are there.  Raises ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and ops.cuda_library == "loaded" else "cpu"
    if name == "cuda" and torch.cuda.is_available() and Ranks.of_torchrun().size > 1:
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"  # a card for each, as far as they go
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: give cpu, cuda or cuda:i") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device can be used here; give --device cpu")
    if device.type == "cuda" and ops.cuda_library != "loaded":
        raise ValueError(f"the CUDA operators are {ops.cuda_library}")
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise ValueError(f"unknown device {name!r}: give cpu, cuda or cuda:i")
    return device
