"""The processes of torchrun: joining them, what they agree on, and what ends them together."""

import contextlib
import os
import re
import signal
import threading
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from config import ConfigError
from weights import TrainError


@dataclass
class World:
    """This process among those of torchrun."""

    rank: int
    size: int
    local_rank: int

    @property
    def master(self):
        return self.rank == 0

    def max(self, values):
        """Element-wise maximum over processes of a short list of numbers, so that all take the same branch."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def sum(self, values):
        return self._reduce(values, dist.ReduceOp.SUM)

    def _reduce(self, values, op):
        if self.size == 1:
            return values
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(tensor, op)
        return tensor.tolist()

    def gather(self, value):
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def start_world(device):
    """The processes that torchrun started, joined (NCCL on CUDA, gloo elsewhere), and this one's device."""
    if "RANK" not in os.environ:
        return World(0, 1, 0), device
    try:
        world = World(*(int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    except (KeyError, ValueError):
        raise ConfigError("RANK is set, but not RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them") from None
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if cuda:
        device = f"cuda:{world.local_rank}"
        torch.cuda.set_device(device)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=end_with_launcher, args=(os.getppid(),), daemon=True).start()
    try:
        dist.init_process_group("nccl" if cuda else "gloo")
    except ValueError as error:  # an address is missing
        raise ConfigError(f"RANK is set, but not all that torchrun sets: {error}") from None
    return world, device


@contextlib.contextmanager
def processes(device):
    """This process among those that torchrun started, and its device. When one of the others is lost, one line."""
    world, device = start_world(device)
    try:
        yield world, device
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = re.sub(r"^\[[^]]*\] *", "", str(error).splitlines()[0]).split(". ")[0]
        raise TrainError(f"a process of the group was lost: {reason}; --init_from=resume goes on") from None
    finally:
        if world.size > 1:
            dist.destroy_process_group()


def end_with_launcher(launcher):
    """torchrun ends its processes when it ends, but not when it is killed. They finish the step then, and save."""
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)  # as long as torchrun waits: another process may never answer
    os._exit(128 + signal.SIGTERM)
