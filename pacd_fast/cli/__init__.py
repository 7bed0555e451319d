"""The command pacd-fast: a module a command, which adds its flags, calls a function, and prints what it found.

`flags` has what they share.  Not an API.  Imports everything.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

import pacd_fast
from pacd_fast.arguments import number, one_line, whole_number
from pacd_fast.cli import audit, bench, certify, evaluate, info, labelflip, poison, report, reproduce, summary, train
from pacd_fast.cli.flags import Help
from pacd_fast.ranks import Ranks

__all__ = ["main", "parser"]

_COMMANDS = (train, certify, evaluate, poison, audit, summary, report, labelflip, reproduce, bench, info)

_AGAIN = {  # commands that keep what they have done
    **dict.fromkeys(("train", "poison"), "; run the same command again with --resume to go on"),
    **dict.fromkeys(("certify", "audit", "reproduce", "labelflip"), "; run the same command again to go on"),
}

_TOGETHER = ("certify", "train", "audit", "poison", "reproduce")  # what several processes do together


class _Parser(argparse.ArgumentParser):
    """Errors of one line; and where a command takes files, a flag of several numbers ends at the first other word."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}; see {self.prog} --help\n")

    def parse_known_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        if any(not action.option_strings and action.nargs == "+" for action in self._actions):
            for action in self._actions:
                if action.nargs == "+" and action.type in (number, whole_number):
                    words = _numbers_last(words, action.option_strings)
        return super().parse_known_args(words, namespace)


def _numbers_last(words: list[str], flags: Sequence[str]) -> list[str]:
    """["--radii", "0.5", "1", "file"] -> ["file", "--radii", "0.5", "1"]."""
    start = next((i for i, word in enumerate(words) if word in flags), None)
    if start is None or "--" in words:
        return words
    end = start + 1
    while end < len(words) and _is_number(words[end]):
        end += 1
    return words[:start] + words[end:] + words[start:end] if end > start + 1 else words


def _is_number(text: str) -> bool:
    try:
        number(text)
    except ValueError:
        return False
    return True


def parser() -> argparse.ArgumentParser:
    """The command line; every command's function is its `run`."""
    top = _Parser(prog="pacd-fast", description=pacd_fast.__doc__)
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

    143 after SIGTERM, where it is the program and a process alone.  141, as shells have it, where the reader of its
    output has gone.
    """
    with contextlib.suppress(FileNotFoundError):  # the folder may be gone
        sys.path.append(os.getcwd())  # a user's package.module:function lies where the command is run
    options = parser().parse_args(arguments)
    try:
        _take_signals()
        if Ranks.of_torchrun().size > 1 and options.command not in _TOGETHER:
            raise ValueError(f"this command is for one process; torchrun is for {', '.join(_TOGETHER)}")
        status = options.run(options) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, head say, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError) as error:
        return _failed(options.command, _one_line(error))
    except torch.OutOfMemoryError as error:
        smaller = {"train": "--microbatch", "certify": "--batch-size", "poison": "--clean-batch"}.get(options.command)
        hint = f"; a smaller {smaller} helps" if smaller else ""
        return _failed(options.command, f"{_one_line(error)}{hint}")
    except KeyboardInterrupt as stop:
        if Ranks.of_torchrun().rank == 0:
            print(f"\npacd-fast {options.command}: stopped{_AGAIN.get(options.command, '')}", file=sys.stderr)
        return 143 if isinstance(stop, _Terminated) else 130
    except Exception as error:
        if Ranks.of_torchrun().size == 1:
            raise
        return _failed(options.command, f"{type(error).__name__}: {_one_line(error)}")


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which is to leave no locks and torn files either."""


def _take_signals() -> None:
    """Where this is the program: Ctrl-C raises from now on, and so does SIGTERM.

    One of several processes, which may be waiting for another, and forks end of SIGTERM as they are.
    """
    if signal.getsignal(signal.SIGINT) is not pacd_fast._stopped:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = os.getpid()

    def terminated(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() == process:
            raise _Terminated
        os.kill(os.getpid(), signal.SIGTERM)

    if Ranks.of_torchrun().size == 1:
        signal.signal(signal.SIGTERM, terminated)


def _failed(command: str, text: str) -> int:
    """Says what is wrong; of several processes the first one that fails does."""
    ranks = Ranks.of_torchrun()
    who = f"rank {ranks.rank}: " if ranks.size > 1 else ""
    after_bar = "\n" if ranks.rank else ""  # rank 0's
    ranks.fail(lambda: print(f"{after_bar}pacd-fast {command}: {who}{text}", file=sys.stderr, flush=True))
    return 2


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return one_line(f"{error.filename or ''}: {error.strerror}".lstrip(": "))
    return one_line(error) or type(error).__name__
