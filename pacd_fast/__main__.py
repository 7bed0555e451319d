"""The command pacd-fast: train, certify, evaluate, poison, audit, labelflip, reproduce, summary, plot and others."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import pacd_fast
from pacd_fast import (
    attack_commands,
    checkpoints,
    datasets,
    evaluate,
    flip_commands,
    models,
    plots,
    presets,
    reproduce,
    results,
    summary,
    training,
    victims,
)
from pacd_fast.certify import certify_each, check_arguments
from pacd_fast.labelflips.results import is_flip_file
from pacd_fast.poison import Poison
from pacd_fast.presets import device_of

_NETWORKS = f"{', '.join(models.BUILT_IN)} or package.module:function"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_AGAIN = {  # commands that keep what they have done
    **dict.fromkeys(("train", "poison"), "; run the same command again with --resume to go on"),
    **dict.fromkeys(("certify", "audit", "labelflip", "reproduce"), "; run the same command again to go on"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; 0 when it worked, 2 with one line on stderr where the input was wrong, 130 after Ctrl-C.

    141, as shells have it, where the reader of its output has gone.
    """
    sys.path.append(os.getcwd())  # a user's package.module:function lies where the command is run
    options = parser().parse_args(arguments)
    try:
        status = options.run(options) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, head say, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError) as error:
        print(f"pacd-fast {options.command}: {_one_line(error)}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        smaller = {"train": "--microbatch", "certify": "--batch-size", "poison": "--clean-batch"}.get(options.command)
        hint = f"; a smaller {smaller} helps" if smaller else ""
        print(f"pacd-fast {options.command}: {_one_line(error)}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = _AGAIN.get(options.command, "")
        print(f"\npacd-fast {options.command}: stopped{again}", file=sys.stderr)
        return 130


def _step(arguments: Sequence[str]) -> int:
    """One command within another, whose errors and Ctrl-C are the other's."""
    options = parser().parse_args(arguments)
    return options.run(options) or 0


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or ''}: {error.strerror}".lstrip(": ")
    return " ".join(str(error).split()) or type(error).__name__


def parser() -> argparse.ArgumentParser:
    """The command line; every command's function is its `run`."""
    top = argparse.ArgumentParser(prog="pacd-fast", description=pacd_fast.__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="command")

    def command(name, run, text):
        sub = commands.add_parser(name, help=text, description=text, formatter_class=presets.Help)
        sub.set_defaults(run=run)
        return sub

    train = command("train", run_train, "train a base classifier")
    train.add_argument("--model", help=f"{_NETWORKS}; by default mnist-cnn, and resnet20 for cifar10")
    _add_data(train)
    train.add_argument("--poison", help="poison file to put into the training images")
    train.add_argument("--method", choices=list(training.METHODS), default="gaussian", help="training loss")
    for name, (number, where) in victims.hyperparameters().items():
        train.add_argument(f"--{name}", type=number, help=f"hyperparameter of {where}")
    train.add_argument("--epochs", type=int, default=100)
    train.add_argument("--batch-size", type=int, default=200)
    train.add_argument("--microbatch", type=int, help="images of a batch at a time, to save memory")
    train.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    train.add_argument(
        "--drops",
        type=int,
        nargs="+",
        default=[],
        metavar="EPOCH",
        help="epochs, counted from 0, from which on the rate is a tenth of what it was",
    )
    train.add_argument("--optimizer", choices=list(training.OPTIMIZERS), default="adam")
    train.add_argument("--weight-decay", type=float, default=0.0)
    train.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="random flip and pad-4 crop; by default for cifar10, but not with smoothadv",
    )
    train.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="of the network's passes; weights keep 32"
    )
    train.add_argument("--seed", type=int, default=0, help="of initial weights, order and noise")
    train.add_argument(
        "--seeds", type=int, default=1, help="victims to train, seeds from --seed on; files are numbered"
    )
    train.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto takes CUDA where it works")
    train.add_argument("--resume", action="store_true", help="go on from the last epoch of an interrupted run")
    train.add_argument("--metrics", help="write a JSON line per epoch to this file")
    train.add_argument("--out", required=True, help="checkpoint to write (.safetensors)")

    certify = command("certify", run_certify, "certify the images of a split; run again, it resumes")
    certify.add_argument("--checkpoint", required=True, help="our .safetensors, a state_dict, or locuslab's checkpoint")
    certify.add_argument("--model", help=f"where the checkpoint does not say it: {_NETWORKS}")
    _add_data(certify)
    certify.add_argument("--split", choices=["test", "train", "val"], default="test")
    certify.add_argument("--sigma", type=float, help="noise level; by default what the checkpoint was trained with")
    certify.add_argument("--n0", type=int, default=100, help="selection samples per image")
    certify.add_argument("--n", type=int, default=100_000, help="estimation samples per image")
    certify.add_argument("--alpha", type=float, default=0.001, help="failure probability of each certificate")
    certify.add_argument("--skip", type=int, default=1, help="certify the images whose index it divides")
    certify.add_argument("--max", type=int, help="stop before this image")
    certify.add_argument("--target-class", type=int, help="only images of this class")
    certify.add_argument("--images", type=int, nargs="+", help="only these images, by index")
    certify.add_argument("--except-class", type=int, help="only images of other classes")
    certify.add_argument("--count", type=int, help="a random choice of this many images, decided by --choice")
    certify.add_argument("--choice", type=int, default=0, help="seed of --count's choice")
    certify.add_argument("--shard", default="0/1", help="i/m: every m-th image, from the i-th; see merge")
    certify.add_argument("--seed", type=int, help="of the noise; by default from the operating system's entropy")
    certify.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="the certificate is for the model in it"
    )
    certify.add_argument("--device", default="auto")
    certify.add_argument("--batch-size", type=int, help="rows a forward pass; measured where it is not given")
    certify.add_argument("--out", required=True, help="results file (.tsv)")

    measure = command("evaluate", run_evaluate, "accuracy, accuracy under noise, and how far an attack has to go")
    measure.add_argument("--checkpoint", required=True, nargs="+", help="one, or one per seed: mean and deviation")
    measure.add_argument("--model", help=f"where the checkpoint does not say it: {_NETWORKS}")
    _add_data(measure)
    measure.add_argument("--split", choices=["test", "train", "val"], default="test")
    measure.add_argument("--sigma", type=float, help="noise level; by default what the checkpoint was trained with")
    measure.add_argument("--target-class", type=int, help="only images of this class")
    measure.add_argument("--count", type=int, default=200, help="images for the attack, a random choice; 0 for none")
    measure.add_argument("--choice", type=int, default=0, help="seed of --count's choice")
    measure.add_argument("--copies", type=int, help="noisy copies in the attack; by default 10 for cifar10, else 20")
    measure.add_argument("--iterations", type=int, default=100, help="steps of the attack at every radius")
    measure.add_argument("--seed", type=int, default=0, help="of the noise")
    measure.add_argument("--device", default="auto")
    measure.add_argument("--json", action="store_true", help="print JSON instead of a table")

    poison = command("poison", run_poison, "craft poison: training images that lower certified robustness")
    _add_data(poison, held_out=None)
    attack_commands.add_poison(poison)
    audit = command("audit", run_audit, "what poison does: train victims with and without it, certify, compare")
    _add_data(audit, held_out=None)
    attack_commands.add_audit(audit)

    sub = command("summary", run_summary, "tabulate results files, ours or those of locuslab/smoothing")
    sub.add_argument("files", nargs="+")
    sub.add_argument("--radii", type=float, nargs="+", help="where to give the certified accuracy")
    sub.add_argument("--target-class", type=int)
    sub.add_argument("--flips", type=int, nargs="+", help="the same for files of label-flip certificates")
    sub.add_argument("--over-seeds", action="store_true", help="add the mean and standard deviation of the files")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")

    plot = command("plot", run_plot, "draw certified accuracy against radius")
    plot.add_argument("files", nargs="+")
    plot.add_argument("--title")
    plot.add_argument("--out", required=True, help=".png, .pdf or .svg")

    merge = command("merge", run_merge, "put the shards of one run together")
    merge.add_argument("files", nargs="+")
    merge.add_argument("--out", required=True)

    flip_commands.add_commands(command)
    reproduce.add_commands(command("reproduce", run_reproduce, "a table or a figure of the papers, in one command"))
    command("info", run_info, "versions, SIMD level, threads, CUDA")
    selftest = command("selftest", run_selftest, "test the noise and the bounds on this machine")
    selftest.add_argument("--draws", type=int, default=20_000_000, help="normal numbers to draw")
    selftest.add_argument("--stream", action="store_true", help="write the random bits to stdout, for a test battery")
    return top


def _add_data(sub: argparse.ArgumentParser, held_out: int | None = 0) -> None:
    sub.add_argument("--data", default="mnist5k", help=f"{', '.join(datasets.NAMES)} or the path of an .npz file")
    sub.add_argument("--data-dir", help="folder of mnist, fashion-mnist, cifar10 in torchvision's layout")
    sub.add_argument("--download", action="store_true", help="fetch the data into --data-dir where it is missing")
    sub.add_argument("--validation", type=int, default=held_out, help="last training images to hold out as split val")
    sub.add_argument("--train-images", type=int, help="keep this many training images, the first ones; by default all")


def run_train(options: argparse.Namespace) -> None:
    device, data = device_of(options.device), datasets.from_options(options)
    if options.poison is not None:
        data = Poison.load(options.poison).apply(data)
    if options.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, not {options.seeds}")
    given = {name: getattr(options, name) for name in victims.hyperparameters() if getattr(options, name) is not None}
    accuracies = []
    for seed in range(options.seed, options.seed + options.seeds):
        out, metrics = (
            path if path is None or options.seeds == 1 else victims.numbered(path, seed)
            for path in (options.out, options.metrics)
        )
        network = victims.train(
            out,
            data,
            options.method,
            given,
            model=options.model,
            epochs=options.epochs,
            batch_size=options.batch_size,
            lr=options.lr,
            weight_decay=options.weight_decay,
            optimizer=options.optimizer,
            drops=options.drops,
            augment=options.augment,
            seed=seed,
            dtype=DTYPES[options.dtype],
            microbatch=options.microbatch,
            device=device,
            resume=options.resume,
            metrics=metrics,
            progress=True,
        )
        right = evaluate.correct(network, *data.split("test"))
        accuracies.append(float(right.double().mean()))
        print(f"{out}: accuracy without noise on {len(right)} test images {accuracies[-1]:.2%}")
    if options.seeds > 1:
        print(f"over {options.seeds} seeds: {summary.mean_and_deviation(accuracies, '.2%')}")


def _chosen(options: argparse.Namespace, labels: torch.Tensor) -> list[int]:
    """The indices to certify: of a class, a random choice or a stride and an end; of these a shard."""
    if options.skip < 1:
        raise ValueError(f"--skip must be at least 1, not {options.skip}")
    if options.max is not None and options.max < 1:
        raise ValueError(f"--max must be at least 1, not {options.max}")
    try:
        shard, shards = (int(part) for part in options.shard.split("/"))
    except ValueError:
        raise ValueError(f"--shard must be i/m like 0/2, not {options.shard!r}") from None
    if not 0 <= shard < shards:
        raise ValueError(f"--shard i/m needs 0 <= i < m, not {options.shard}")
    if shards > 1 and options.seed is None and not Path(options.out).exists():
        raise ValueError("shards are merged only where they have one seed: give them the same --seed")
    wanted = labels != (-1 if options.except_class is None else options.except_class)
    if options.images is not None:
        if not all(0 <= index < len(labels) for index in options.images):
            raise ValueError(f"--images must be in [0, {len(labels)}), not {' '.join(map(str, options.images))}")
        named = torch.zeros_like(wanted)
        named[options.images] = True
        wanted &= named
    if options.target_class is not None:
        wanted &= labels == options.target_class
    there = wanted.nonzero().flatten()
    if options.count is not None:
        if options.skip != 1 or options.max is not None:
            raise ValueError("--count chooses at random and --skip and --max by index: give one or the other")
        if not 1 <= options.count <= len(there):
            raise ValueError(f"--count {options.count}: there are {len(there)} such images to choose from")
        there = there[datasets.random_subset(there, None, options.count, options.choice)]
    chosen = there.tolist()
    chosen = [i for i in chosen if i % options.skip == 0 and (options.max is None or i < options.max)]
    if not chosen:
        raise ValueError("no image is left to certify: look at --target-class, --skip and --max")
    return chosen[shard::shards]


def run_certify(options: argparse.Namespace) -> None:
    device, data = device_of(options.device), datasets.from_options(options)
    images, labels = data.split(options.split)
    chosen = _chosen(options, labels)
    checkpoint = checkpoints.load(
        options.checkpoint,
        arch=options.model,
        num_classes=data.num_classes,
        in_channels=data.in_channels,
        image_size=data.image_size,
    )
    sigma = options.sigma if options.sigma is not None else checkpoint.sigma or None  # 0: trained without noise
    if sigma is None:
        raise ValueError("the checkpoint does not say which noise it was trained with: give --sigma")
    existing = results.peek(options.out) if Path(options.out).exists() else None
    seed = options.seed if options.seed is not None else existing.seed if existing else secrets.randbits(63)
    run = results.Run(
        n0=options.n0,
        n=options.n,
        alpha=options.alpha,
        sigma=sigma,
        seed=seed,
        dtype=options.dtype,
        model=f"{checkpoint.arch}@{checkpoint.fingerprint}",
        data=data.tag(options.split),
    )
    check_arguments(options.n0, options.n, options.alpha, sigma, seed)
    with results.ResultsFile(options.out, run) as file:
        todo = torch.tensor([i for i in chosen if i not in file.done], dtype=torch.int64)
        if len(todo) < len(chosen):
            print(
                f"{options.out}: {len(chosen) - len(todo)} of {len(chosen)} images are there, {len(todo)} to go",
                file=sys.stderr,
            )
        each = certify_each(
            checkpoint.model.to(device),
            datasets.as_float(images[todo]),
            num_classes=checkpoint.num_classes,
            sigma=sigma,
            n0=options.n0,
            n=options.n,
            alpha=options.alpha,
            seed=seed,
            dtype=DTYPES[options.dtype],
            batch_size=options.batch_size,
            image_ids=todo,
            progress=True,
        )
        with contextlib.closing(each):
            for one in each:
                idx = int(todo[one.index])
                votes = int(one.counts[one.selected])
                file.append(
                    results.Row(idx, int(labels[idx]), one.prediction, one.radius, one.p_lower, votes, one.seconds)
                )


def run_evaluate(options: argparse.Namespace) -> None:
    device, data = device_of(options.device), datasets.from_options(options)
    measured: list[evaluate.Measured] = []
    try:
        for one in _evaluate_each(options, device, data):
            measured.append(one)
    finally:  # after Ctrl-C, what there is
        if measured:
            if len(measured) < len(options.checkpoint):
                done = " ".join(options.checkpoint[: len(measured)])
                print(f"\nstopped early: the figures are those of {done}", file=sys.stderr)
            if options.json:
                print(json.dumps(evaluate.to_dict(measured, data.class_names), indent=2))
            else:
                print(evaluate.table(measured, data.class_names))


def _evaluate_each(
    options: argparse.Namespace, device: torch.device, data: datasets.Dataset
) -> Iterator[evaluate.Measured]:
    """The figures of one checkpoint after the other."""
    images, labels = data.split(options.split)
    if options.target_class is not None:
        chosen = labels == options.target_class
        images, labels = images[chosen], labels[chosen]
    attacked = None
    if options.count:
        attacked = datasets.random_subset(labels, None, min(options.count, len(labels)), options.choice)
    copies = (10 if data.name == "cifar10" else 20) if options.copies is None else options.copies
    for path in options.checkpoint:
        checkpoint = checkpoints.load(
            path,
            arch=options.model,
            num_classes=data.num_classes,
            in_channels=data.in_channels,
            image_size=data.image_size,
        )
        sigma = options.sigma if options.sigma is not None else checkpoint.sigma or None  # 0: trained without noise
        if sigma is None:
            raise ValueError(f"{path} does not say what noise it was trained with: give --sigma")
        yield evaluate.measure(
            checkpoint.model.to(device),
            datasets.as_float(images),
            labels,
            sigma=sigma,
            attacked=attacked,
            copies=copies,
            iterations=options.iterations,
            seed=options.seed,
            progress=True,
        )


def run_poison(options: argparse.Namespace) -> None:
    attack_commands.run_poison(options, attack_commands.load(options), device_of(options.device))


def run_audit(options: argparse.Namespace) -> int:
    return attack_commands.run_audit(options, attack_commands.load(options), device_of(options.device), _step)


def run_reproduce(options: argparse.Namespace) -> int:
    return reproduce.run(options, _step)


def _named(files: Sequence[str]) -> dict[str, results.Results]:
    """The files by name; by path where names repeat."""
    names = [Path(file).name.removesuffix(".tsv") for file in files]
    return {
        name if names.count(name) == 1 else str(file): results.read(file)
        for name, file in zip(names, files, strict=True)
    }


def run_summary(options: argparse.Namespace) -> None:
    flips = all(is_flip_file(path) for path in options.files)
    if flips and (options.radii or options.target_class is not None or options.over_seeds):
        raise ValueError("--radii, --target-class and --over-seeds are not for files of label flips, but --flips is")
    if options.flips and not flips and all(Path(path).exists() for path in options.files):
        raise ValueError("--flips is for files of label flips alone")
    if options.json and options.over_seeds:
        raise ValueError("--over-seeds adds a column to the table: leave out --json")
    if flips:
        flip_commands.summarize(options.files, options.flips, options.json)
        return
    read = _named(options.files)
    if options.json:
        found = {
            name: summary.summarize(each, options.radii, options.target_class).to_dict() for name, each in read.items()
        }
        print(json.dumps(found, indent=2))
    else:
        print(summary.table(read, options.radii, options.target_class, options.over_seeds))


def run_plot(options: argparse.Namespace) -> None:
    if all(is_flip_file(path) for path in options.files):
        flip_commands.plot(options.files, options.out, options.title)
        print(options.out)
        return
    plots.certified_accuracy(_named(options.files), options.out, options.title)
    print(options.out)


def run_merge(options: argparse.Namespace) -> None:
    print(f"{options.out}: {results.merge(options.files, options.out)} images")


def run_info(options: argparse.Namespace) -> None:
    from pacd_fast._C import build_info

    built = build_info()
    print(f"pacd_fast     {pacd_fast.__version__}, built by {built['compiler']} with torch {built['built_with_torch']}")
    print(f"python        {platform.python_version()}, torch {torch.__version__}, {platform.platform()}")
    print(f"SIMD          {built['simd']}")
    print(f"threads       {torch.get_num_threads()}")
    compiled = f"compiled by {built['cuda_compiler']} for {built['cuda_architectures']}"
    print(f"CUDA library  {pacd_fast.ops.cuda_library} ({compiled})")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    print(f"CUDA device   {device}")


def run_selftest(options: argparse.Namespace) -> int:
    from pacd_fast import selftest

    if options.stream:
        with contextlib.suppress(BrokenPipeError):
            selftest.write_bits(sys.stdout.buffer)
        return 0
    failed = 0
    for check in selftest.checks(options.draws):
        print("  ".join(str(value) for value in dataclasses.astuple(check)))
        failed += check.verdict != "ok"
    print(f"{'all is well' if not failed else f'{failed} checks failed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
