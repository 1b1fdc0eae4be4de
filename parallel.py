"""Several processes: joining them, what each keeps of a model and of its checkpoints, and what ends or resumes them.

    torchrun --standalone --nproc_per_node=8 train.py config/x.py --gradient_accumulation_steps=8 --parallel=fsdp
    python parallel.py OUT_DIR       # the last checkpoint of such a run as OUT_DIR/ckpt.pt, for sample.py and bench.py

With --parallel=ddp each process holds the whole model. With fsdp each holds its rows of every parameter and of the
optimizer's state, and writes them to OUT_DIR/shards/ITERATION/ beside the steps that follow.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import re
import signal
import socket
import threading
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import config
import weights
from config import ConfigError
from weights import ModelError, TrainError


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


# -----------------------------------------------------------------------------
# the group


def start_world(device, timeout):
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
    options = {"timeout": datetime.timedelta(seconds=timeout)}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        options |= dict(store=meeting_place(world, timeout), rank=world.rank, world_size=world.size)
    try:
        dist.init_process_group("nccl" if cuda else "gloo", **options)
    except ValueError as error:  # an address is missing
        raise ConfigError(f"RANK is set, but not all that torchrun sets: {error}") from None
    return world, device


def meeting_place(world, timeout):
    """A store where processes find each other, of this start alone: torchrun's own still holds the addresses of those
    that a restart has replaced. There the first process says where this one is; what it said before a restart leads
    nowhere."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    known = dist.TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=timeout))
    if world.master:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        known.set("meeting_place", str(store.port))
        return store
    give_up = time.monotonic() + timeout
    while True:
        port = int(known.get("meeting_place"))
        try:
            return dist.TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=2))
        except RuntimeError as error:
            if time.monotonic() > give_up:
                raise TrainError(f"the first process was not found: {str(error).splitlines()[0]}") from None


@contextlib.contextmanager
def processes(device, timeout):
    """This process among those that torchrun started, and its device. When one of the others is lost, or has not
    answered for `timeout` seconds, one line."""
    world, device = start_world(device, timeout)
    try:
        yield world, device
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = re.sub(r"^\[[^]]*\] *", "", str(error).splitlines()[0]).split(". ")[0]
        raise TrainError(f"a process of the group was lost: {reason}; --init_from=resume goes on") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def end_with_launcher(launcher):
    """torchrun ends its processes when it ends, but not when it is killed. They finish the step then, and save."""
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)  # as long as torchrun waits: another process may never answer
    os._exit(128 + signal.SIGTERM)


def launchers(world):
    """The torchruns, one a node, that started these processes, each by a name that no other ever has on its machine."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    began = ""
    with contextlib.suppress(OSError), open(f"/proc/{os.getppid()}/stat") as f:  # numbers of processes come again
        began = f.read().rpartition(")")[2].split()[19]
    return sorted({*world.gather(f"{socket.gethostname()} {os.getppid()} {began}")})


def restarted(cfg, world, launch):
    """`cfg`, to resume where a torchrun of `launch` has started this run before, and it has saved: the processes of
    --max_restarts are given the command of the first ones."""
    known = []
    path = os.path.join(cfg.out_dir, "config.json")
    with contextlib.suppress(OSError, ValueError, AttributeError), open(path, encoding="utf-8") as f:
        known = json.load(f).get("launch") or []
    again = {*launch} & {*known} and weights.has_saved(cfg.out_dir) and not cfg.eval_only
    return dataclasses.replace(cfg, init_from="resume") if world.max([bool(again)])[0] else cfg


# -----------------------------------------------------------------------------
# what each process keeps


def is_sharded(cfg):
    return cfg.parallel == "fsdp" and dist.is_initialized()


def shard(model, device, matching):
    """Leave this process its rows of each parameter (FSDP2), on `device`. A block is whole for the time of its passes;
    embeddings and head, which may be tied, until the end of the backward pass. Parameters and gradients travel in
    float32, and autocast chooses what is computed in less, as with DDP: the losses are the same. matching: attention is
    called without its block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    options = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    try:
        for block in model.transformer.h:
            if matching:
                fully_shard(block.attn, **options)
            fully_shard(block, **options)
        fully_shard(model, **options, reshard_after_forward=False)
    except ValueError as error:
        raise ModelError(f"parallel=fsdp: {str(error).splitlines()[0]}") from None
    for name in ("hidden", "attend"):  # what is called in place of forward
        register_fsdp_forward_method(model, name)
    torch.optim._muon._zeropower_via_newtonschulz = orthogonal


def orthogonal(matrix, *options, of_whole=torch.optim._muon._zeropower_via_newtonschulz):
    """Muon's update of a matrix. One of shards is gathered, and each process keeps its rows of the update."""
    if not weights.is_part(matrix):
        return of_whole(matrix, *options)
    return weights.share(matrix, of_whole(matrix.full_tensor(), *options))


def whole_norm(norm):
    return norm.full_tensor() if weights.is_part(norm) else norm


def own_weights(model):
    """What this process holds of each parameter."""
    if hasattr(model, "reshard"):
        model.reshard()
    parts = [p.to_local() if weights.is_part(p) else p for p in model.parameters()]
    return [p for p in parts if p.numel()]


def stats(block):
    """attn.stats() as lists, of a block whose parameters all processes gather for it."""
    sharded = [m for m in (block, block.attn) if hasattr(m, "unshard")]
    for m in sharded:
        m.unshard()
    found = {name: value.tolist() for name, value in block.attn.stats().items()}
    for m in sharded:
        m.reshard()
    return found


@torch.no_grad()
def whole(model, world, make):
    """The model, or of one in shards a copy in host memory, from make(config); None but on the first process."""
    if not hasattr(model, "unshard"):
        return model if world.master else None
    found, gathered = {}, {}
    for name, w in model.state_dict(keep_vars=True).items():
        if id(w) not in gathered:  # a tied head is its embedding
            full = whole_norm(w.detach())
            gathered[id(w)] = full.cpu() if world.master else None
        found[name] = gathered[id(w)]
    if not world.master:
        return None
    with torch.device("meta"):
        copy = make(model.config)
    copy.load_state_dict(found, assign=True)
    return copy


def wrap(objective, device, unused):
    """The objective with DDP's hooks, unless its model is in shards. unused: some parameters have no gradient."""
    if hasattr(objective.model, "unshard"):
        return objective
    ids = [device] if device.startswith("cuda") else None
    return DistributedDataParallel(objective, device_ids=ids, find_unused_parameters=unused)


def exchange(objective, last):
    """Exchange gradients in the next backward pass, or not: once a step, with its last micro-batch."""
    if isinstance(objective, DistributedDataParallel):
        objective.require_backward_grad_sync = last
    elif hasattr(objective.model, "unshard"):
        objective.model.set_requires_gradient_sync(last)


def saver(cfg, world, writer):
    """What writes the checkpoints of a run; in one file, by `writer`."""
    if not is_sharded(cfg):
        return weights.OneFile(world, writer)
    return weights.Shards(world, dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=cfg.peer_timeout)))


def main(argv):
    """Consolidate: the last checkpoint of a run in shards, as ckpt.pt beside them."""
    if len(argv) != 1 or argv[0].startswith("-"):
        raise ConfigError("write python parallel.py OUT_DIR")
    (out_dir,) = argv
    if not os.path.isdir(out_dir):
        raise ModelError(f"{out_dir}: no such folder")
    with weights.lock_folder(out_dir):
        weights.place_new_run(out_dir)
        stored = weights.read_last(out_dir)
        path, said = os.path.join(out_dir, "ckpt.pt"), stored.pop("path")
        if said == path:
            print(f"{path} is the last checkpoint, at iteration {stored['iter_num']}")
            return 0
        weights.write_atomically(path, lambda f: torch.save(stored, f))
    print(f"{said} at iteration {stored['iter_num']} -> {path}")
    return 0


if __name__ == "__main__":
    config.run(main, ModelError, TrainError)
