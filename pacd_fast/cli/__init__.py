"""The command pacd-fast: a module a command, which adds its flags, calls a function, and prints what it found.

`flags` has what they share.  Not an API.  Imports everything.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

import pacd_fast
from pacd_fast.cli import audit, certify, evaluate, info, labelflip, poison, reproduce, summary, train
from pacd_fast.cli.flags import Help

__all__ = ["main", "parser"]

_COMMANDS = (train, certify, evaluate, poison, audit, summary, labelflip, reproduce, info)

_AGAIN = {  # commands that keep what they have done
    **dict.fromkeys(("train", "poison"), "; run the same command again with --resume to go on"),
    **dict.fromkeys(("certify", "audit", "reproduce"), "; run the same command again to go on"),
}


def parser() -> argparse.ArgumentParser:
    """The command line; every command's function is its `run`."""
    top = argparse.ArgumentParser(prog="pacd-fast", description=pacd_fast.__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="command")

    def add(name, run, text):
        sub = commands.add_parser(name, help=text, description=text, formatter_class=Help)
        sub.set_defaults(run=run)
        return sub

    for module in _COMMANDS:
        module.add_commands(add)
    return top


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
        print(f"\npacd-fast {options.command}: stopped{_AGAIN.get(options.command, '')}", file=sys.stderr)
        return 130


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or ''}: {error.strerror}".lstrip(": ")
    return " ".join(str(error).split()) or type(error).__name__
