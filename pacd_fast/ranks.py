"""The processes that torchrun started for one run: who takes what, and what they tell each other, by torch's store.

On one machine (`-m --`: some versions of torchrun else take a flag such as --n for one of their own)::

    torchrun --standalone --nproc-per-node 4 --max-restarts 3 -m -- pacd_fast certify ... --out results.tsv

Over nodes, by Slurm, one torchrun each, and as many processes as a node has cards (or groups of cores; set
OMP_NUM_THREADS then)::

    #SBATCH --nodes=4 --ntasks-per-node=1
    HEAD=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)
    srun torchrun --nnodes $SLURM_NNODES --nproc-per-node 4 --max-restarts 3 --rdzv-id $SLURM_JOB_ID \\
        --rdzv-backend c10d --rdzv-endpoint $HEAD:29500 -m -- pacd_fast certify ... --out results.tsv

The same without torchrun, where no process need hear of another: `certify ... --seed 7 --shard i/4 --out part-i.tsv`
for i = 0 to 3, then `merge part-*.tsv --out results.tsv`.

- certify: images are handed out as ranks ask for them, and each appends to a file beside --out (results.tsv.rank1, ...)
  until all are one; `--share samples` shares every image's samples.  Killed, whole or in part, the same command goes on
  with any number of processes; without --max-restarts too.
- train --seeds N, audit, reproduce (but for label flips): victims are handed out, and PACD's poison of a table.
  Where a table has fewer poisons than processes, or train, clean-mnist and clean-cifar10 fewer victims, all do each
  together.
- train of fewer networks than processes, poison pacd: rows of every batch.  poison metapoison: surrogates.  Run again
  with --resume, with any number of processes.  For a network with batch norm, which asks the others at every layer,
  the cores of one machine are better used as the threads of one process.
- All need one disk for --out, --work, one version of this package, and devices of one kind; the other commands are for
  one process.
"""

from __future__ import annotations

import functools
import io
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

__all__ = ["Ranks"]

_ASK = 0.05  # seconds after which one that waits for others looks again
_SPEAKS = 5.0  # seconds that one who failed first may take to say so


class Ranks:
    """The processes of a run; one that is alone asks nobody.

    All of them make the same calls in the same order, but for `take` and `add`.  Nothing but the store is needed, which
    outlives a killed process under torchrun; `group`, and with it `summed`, makes a process group.

    Args:
        store: a torch.distributed.Store of theirs, or None for one process.
        rank, size: which of how many this is.
    """

    def __init__(self, store: Any = None, rank: int = 0, size: int = 1):
        self.rank, self.size, self._store, self._names, self._group = rank, size, store, 0, None

    @classmethod
    @functools.cache
    def of_torchrun(cls) -> Ranks:
        """Those that torchrun started, or this process alone."""
        if not dist.is_available() or not dist.is_torchelastic_launched() or os.environ.get("WORLD_SIZE", "1") == "1":
            return cls()
        store, rank, size = next(iter(dist.rendezvous("env://")))
        store = dist.PrefixStore("pacd_fast", store)
        return cls(dist.PrefixStore(_attempt(store, rank, size), store), rank, size)

    @classmethod
    def of_group(cls, group: Any) -> Ranks:
        """Those of a process group that is initialised already; called by all of them.  None: this process alone."""
        if group is None:
            return cls()
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ValueError("this process is not in the group")
        name = [secrets.token_hex(8)]
        dist.broadcast_object_list(name, dist.get_global_rank(group, 0), group)
        store = dist.distributed_c10d._get_default_store()
        found = cls(dist.PrefixStore(f"pacd_fast/{name[0]}", store), rank, size)
        found._group = group
        return found

    def name(self) -> str:
        """A name that was not used before, the same for all."""
        self._names += 1
        return str(self._names)

    def take(self, name: str) -> int:
        """0, 1, 2, ...: each number to one of them, under a name."""
        return self.add(name, 1) - 1

    def add(self, name: str, amount: int) -> int:
        """The sum of what all have added under a name so far."""
        return int(self._store.add(f"sum/{name}", amount))

    def handed(self, count: int) -> Iterator[int]:
        """Which of 0, ..., count - 1 this one is to do, as it asks for them."""
        if self.size == 1:
            yield from range(count)
            return
        name = self.name()
        while (taken := self.take(name)) < count:
            yield taken

    def teams(self, count: int) -> tuple[Ranks, Iterable[int]]:
        """Which of 0, ..., count - 1 this one is to do, and with whom: alone, or, of fewer than processes, with all."""
        return (self, range(count)) if count < self.size else (Ranks(), self.handed(count))

    def everyones(self, value: Any) -> list[Any]:
        """What each said here, in the order of the ranks; values of JSON.  Waits for all."""
        if self.size == 1:
            return [value]
        name = self.name()
        self._store.set(f"{name}/{self.rank}", json.dumps(value))
        return self._answers(name)

    def restarted(self) -> bool:
        """Whether torchrun started them again after one has failed, so that they go on with what is there."""
        return any(self.everyones(self.size > 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))

    def agree(self, about: Mapping[str, Any]) -> None:
        """Raises ValueError, naming rank and difference, where they do not all say the same; values of JSON.

        They must be of one version of this package besides.
        """
        first, *others = self.everyones({"pacd_fast": version("pacd_fast"), **about})
        for rank, other in enumerate(others, start=1):
            for key, value in first.items():
                if other.get(key) != value:
                    raise ValueError(
                        f"{key} is {other.get(key)} at rank {rank} and {value} at rank 0: all need the same"
                    )

    def to_first(self, value: Any) -> list[Any]:
        """What `everyones` returns to rank 0; the others get nothing, and wait for nobody."""
        if self.size == 1:
            return [value]
        name = self.name()
        self._store.set(f"{name}/{self.rank}", json.dumps(value))
        return self._answers(name) if self.rank == 0 else []

    def _answers(self, name: str) -> list[Any]:
        keys = [f"{name}/{rank}" for rank in range(self.size)]
        _wait(self._store, keys)
        texts = self._store.multi_get(keys) if self._store.has_extended_api() else map(self._store.get, keys)
        return [json.loads(text) for text in texts]

    def fail(self, say: Callable[[], None]) -> None:
        """The first of them to fail says why; whoever ends after it has let it speak, for torchrun then stops all."""
        if self.size == 1:
            return say()
        try:
            if self.add("failed", 1) == 1:
                say()
                self._store.set("said", "")
            else:
                until = time.monotonic() + _SPEAKS
                while not self._store.check(["said"]) and time.monotonic() < until:
                    time.sleep(_ASK)
        except RuntimeError:  # the store has gone
            say()

    def group(self) -> Any:
        """Their process group, made where there is none yet; None for one that is alone.

        gloo, and nccl between cards where each has one of its own.
        """
        if self.size > 1 and self._group is None:
            cards = torch.cuda.device_count() if dist.is_nccl_available() else 0
            own = cards >= int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
            backend = "cpu:gloo,cuda:nccl" if own else "gloo"
            dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.size)
            self._group = dist.group.WORLD
        return self._group

    def summed(self, array: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sum of everyone's arrays of one shape."""
        if self.size == 1:
            return array
        return self.summed_tensor(torch.from_numpy(np.ascontiguousarray(array))).numpy()

    def summed_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same for tensors, each on its device; by way of a card where the group has nccl alone."""
        if self.size == 1:
            return tensor
        group = self.group()
        device = torch.device("cuda") if dist.get_backend(group) == "nccl" else tensor.device
        sent = tensor.detach().to(device, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(sent, group=group)
        return sent.to(tensor.device)

    def gathered(self, value: Any) -> list[Any]:
        """What each gave, tensors and plain values, to rank 0, on the CPU; the others get nothing."""
        if self.size == 1:
            return [value]
        packed = io.BytesIO()
        torch.save(value, packed)
        group, found = self.group(), [b""] * self.size
        to = dist.get_global_rank(group, 0)
        dist.gather_object(packed.getvalue(), found if self.rank == 0 else None, to, group)
        if self.rank:
            return []
        return [torch.load(io.BytesIO(each), map_location="cpu", weights_only=True) for each in found]


def _attempt(store: Any, rank: int, size: int) -> str:
    """A name that only these processes have: torchrun keeps its store when it restarts them, and its count is a node's.

    Rank 0 thinks of one.  The others may read that of an attempt before; but there nobody answers them.
    """
    mine = secrets.token_hex(8)
    if rank == 0:
        store.set("attempt", mine)
        for other in range(1, size):
            _wait(store, [key := f"{mine}/hello/{other}"])
            store.set(f"{mine}/welcome/{store.get(key).decode()}", "")
        return mine
    while True:
        _wait(store, ["attempt"])
        attempt: str = store.get("attempt").decode()
        store.set(f"{attempt}/hello/{rank}", mine)
        for _ in range(100):
            if store.check([f"{attempt}/welcome/{mine}"]):
                return attempt
            if store.get("attempt").decode() != attempt:
                break
            time.sleep(0.01)


def _wait(store: Any, keys: list[str]) -> None:
    """For others, however long they take: where one has died torchrun ends all.  (Store.wait warns while it waits.)"""
    pause = 0.001
    while not store.check(keys):
        if store.check(["said"]):
            raise SystemExit(2)  # another has said why
        time.sleep(pause)
        pause = min(2 * pause, _ASK)
