"""What a run keeps: its folder, its log, its weights; one model copied into another."""

import contextlib
import functools
import json
import os
import pickle
import re
import shutil
import sys
import types
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch

from config import ConfigError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

try:
    import resource
except ImportError:  # on Windows
    resource = None

RUN_FILES = ("config.json", "log.jsonl", "best.pt", "ckpt.pt", "shards", "model.safetensors", "hf")  # of one run


class ModelError(ValueError):
    """A model that cannot be built or loaded; the message is one line."""


class TrainError(RuntimeError):
    """A run that cannot go on; the message is one line."""


# -----------------------------------------------------------------------------
# the folder of a run: files are replaced whole, one run writes at a time


def write_atomically(path, write):
    """Call write(file) on a temporary file beside `path`, sync it, and rename it over `path`: a reader sees the old
    file or the new one, whole. A failure (a full disk) leaves the old one and raises TrainError."""
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise cannot_write(path, error, "; the one before it is intact" if os.path.exists(path) else "") from None


def cannot_write(path, error, kept=""):
    """The TrainError that says why. torch.save puts an error of its own over the system's."""
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    return TrainError(f"cannot write {path}: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}{kept}")


def lock_folder(out_dir):
    """An open file that keeps a second run out of the folder."""
    path = os.path.join(out_dir, ".lock")
    lock = open(path, "w") if fcntl is not None else None
    try:
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        if os.path.exists(path):
            os.unlink(path)  # Windows removes no file that another run holds open
        return open(path, "x")
    except OSError:
        raise TrainError(f"{out_dir}: another run is writing there; take another --out_dir") from None


def has_saved(folder):
    return os.path.exists(os.path.join(folder, "ckpt.pt")) or last_shards(folder) is not None


def place_new_run(out_dir):
    """Put a new run in the earlier one's place, once it has saved. A start and a save call this. What a kill leaves:

    .new/ without a checkpoint   the earlier run is whole; the new one has saved nothing
    .new/ with one               the new run is whole; the earlier one's files are on their way to previous/
    .placing/                    the earlier run is whole in previous/; the new one's are on their way to out_dir
    none of them                 the run in out_dir is whole
    """

    def move(source, target):
        for name in RUN_FILES:
            if os.path.exists(os.path.join(source, name)):
                os.replace(os.path.join(source, name), os.path.join(target, name))

    new, placing, previous = (os.path.join(out_dir, name) for name in (".new", ".placing", "previous"))
    if has_saved(new):
        aside = os.path.join(new, "previous")
        os.makedirs(aside, exist_ok=True)
        move(out_dir, aside)
        if os.listdir(aside):
            shutil.rmtree(previous, ignore_errors=True)
            os.rename(aside, previous)
            print(f"the earlier run of {out_dir} is in {previous} now (--init_from=resume would have gone on from it)")
        os.rename(new, placing)
    if os.path.exists(placing):
        move(placing, out_dir)
        shutil.rmtree(placing)


class Log:
    """log.jsonl in `folder`, and W&B when asked. On resume the file is cut where the checkpoint was written."""

    def __init__(self, cfg, folder, progress, size, resolved):
        self.wandb = start_wandb(cfg, progress, resolved) if cfg.wandb_log else None
        self.folder = folder
        with self.open() as f:
            f.seek(0)
            kept = f.read()[:size]
            f.truncate(kept.rfind(b"\n") + 1)
        if len(kept) < (size or 0):
            print(f"{f.name} lacks {size - len(kept)} bytes that the checkpoint counts: lines are missing")

    @contextlib.contextmanager
    def open(self):
        """The file, to be written at its end. It is open for a moment only: its folder may change."""
        path = os.path.join(self.folder, "log.jsonl")
        try:
            with open(path, "a+b") as f:
                yield f
        except OSError as error:
            raise cannot_write(path, error) from None

    def write(self, **entry):
        with self.open() as f:
            numbers = json.loads(json.dumps(entry), parse_constant=lambda name: None)  # JSON has no NaN, no Infinity
            f.write((json.dumps(numbers) + "\n").encode())
        if self.wandb is not None:
            prefix = f"{entry['split']}/" if "split" in entry else "train/"
            numbers = {prefix + k: v for k, v in entry.items() if isinstance(v, (int, float)) and k != "iter"}
            if "stats" in entry:
                from wandb import Histogram

                numbers = {f"stats/{name}": Histogram(values) for name, values in entry["stats"].items()}
            self.wandb.log(numbers, step=entry["iter"])

    def size(self):
        with self.open() as f:
            os.fsync(f.fileno())
            return f.tell()

    def close(self, status):
        if self.wandb is not None:
            self.wandb.finish(exit_code=status)


def peak_memory(device_type):
    """For the log: peak resident memory of the process, but on Windows, and peak CUDA memory, in MB."""
    entry = {}
    if resource is not None:
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
        entry["rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)
    if device_type == "cuda":
        entry["cuda_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return entry


def start_wandb(cfg, progress, resolved):
    try:
        import wandb
    except ImportError:
        raise ConfigError("wandb_log: the package is missing; pip install wandb, or --wandb_log=False") from None
    name = cfg.wandb_run_name or os.path.basename(os.path.abspath(cfg.out_dir))
    options = dict(project=cfg.wandb_project, name=name, id=progress.wandb_id or None, mode=cfg.wandb_mode)
    try:
        run = wandb.init(config=resolved, dir=cfg.out_dir, resume="allow", **options)
    except Exception as error:  # no key, no network
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"wandb_log: {reason}; --wandb_mode=offline works without a network") from None
    progress.wandb_id = run.id
    return run


# -----------------------------------------------------------------------------
# weights in files


def is_training_folder(folder):
    """Whether a folder holds our checkpoints (ckpt.pt, or an export), not a Hugging Face model."""
    if any(os.path.exists(os.path.join(folder, name)) for name in ("ckpt.pt", "best.pt")):
        return True
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            resolved = json.load(f)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(resolved, dict) and "train" in resolved


def read_checkpoint(out_dir, name=None):
    """The dict in out_dir/name (default: best.pt, else ckpt.pt, else model.safetensors with config.json): `model`
    (tensors by name), `model_args` (config), and what training added. Loads tensors and plain values only."""
    names = [name] if name else ["best.pt", "ckpt.pt", "model.safetensors"]
    path = next((p for p in (os.path.join(out_dir, n) for n in names) if os.path.exists(p)), None)
    if path is None:
        how = f"python parallel.py {out_dir} makes ckpt.pt of its shards" if last_shards(out_dir) else ""
        raise ModelError(
            f"no checkpoint in {out_dir}: looked for {', '.join(names)}; {how or 'train one with train.py'}"
        )
    try:
        if path.endswith(".safetensors"):
            stored = _read_export(path)
        else:
            with warnings.catch_warnings(), ThreadPoolExecutor(1) as beside:  # checking costs as much time as loading
                warnings.simplefilter("ignore")  # of pickle modules that a foreign file names
                checked = beside.submit(check_archive, path)
                stored = torch.load(path, map_location="cpu", weights_only=True)
                checked.result()
    except Exception as error:  # a damaged archive, a pickle with code in it, another library's format
        if isinstance(error, OSError) and error.filename:
            raise
        raise ModelError(f"{path}: not a readable checkpoint (damaged, or not tensors and plain values)") from None
    if not isinstance(stored, dict) or not all(isinstance(stored.get(k), dict) for k in ("model", "model_args")):
        raise ModelError(f"{path}: not a checkpoint of this repository or of nanoGPT (no model and model_args)")
    if not all(isinstance(k, str) and is_dense(v) for k, v in stored["model"].items()):
        raise ModelError(f"{path}: damaged: its model is not dense tensors by name")
    prefix = "_orig_mod."  # nanoGPT saves the compiled module, whose names carry it
    stored["model"] = {k.removeprefix(prefix): v for k, v in stored["model"].items()}
    stored["path"] = path
    return stored


def save_checkpoint(path, model, **extra):
    """Tensors and plain values only, under nanoGPT's names, so that torch.load(weights_only=True) reads it."""
    stored = {"format": 1, "model": model.state_dict(), "model_args": asdict(model.config), **extra}
    write_atomically(path, lambda f: torch.save(stored, f))


class Writer:
    """Saves checkpoints: at once, or `beside` the steps, in a thread that writes a copy on the CPU. A path's next
    checkpoint waits for the one before it; an error of the thread is raised there, or by `wait`."""

    def __init__(self, beside):
        self.pool, self.jobs = ThreadPoolExecutor(1) if beside else None, {}

    def save(self, path, model, **extra):
        if self.pool is None:
            return save_checkpoint(path, model, **extra)
        if path in self.jobs:
            self.jobs.pop(path).result()
        stored = copied({"format": 1, "model": model.state_dict(), "model_args": asdict(model.config), **extra}, {})
        self.jobs[path] = self.pool.submit(write_atomically, path, lambda f: torch.save(stored, f))

    def wait(self):
        """Return when all is written."""
        while self.jobs:
            self.jobs.pop(next(iter(self.jobs))).result()


def copied(value, seen):
    """A copy on the CPU of tensors in dicts and lists; tensors of one storage, such as a tied head, stay one."""
    if isinstance(value, dict):
        return {k: copied(v, seen) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(v, seen) for v in value)
    if not torch.is_tensor(value):
        return value
    place = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
    if value.numel() == 0 or place not in seen:
        seen[place] = value.detach().to("cpu", copy=True)
    return seen[place]


def check_stored(stored, build):
    """Raise ModelError unless a checkpoint has the tensors of the model that build() makes of its config, in their
    shapes. This takes no memory: the sizes that a damaged file says may be beyond any."""
    try:
        with torch.device("meta"):
            model = build()
    except ModelError as error:
        raise ModelError(f"{stored['path']}: {error}") from None
    except (RuntimeError, OverflowError) as error:
        raise ModelError(f"{stored['path']}: no model has these sizes: {str(error).splitlines()[0]}") from None
    own = model.state_dict()
    for name, w in stored["model"].items():
        if name in own and w.shape != own[name].shape:
            said, has = tuple(own[name].shape), tuple(w.shape)
            raise ModelError(f"{stored['path']}: {name} has the shape {has}, by its config {said}: damaged")
    missing = [name for name in own if name not in found(model, stored["model"])]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ModelError(f"{stored['path']}: the checkpoint lacks {', '.join(missing[:4])}{more}")


def is_dense(value):
    return torch.is_tensor(value) and value.layout == torch.strided and value.is_cpu and not value.is_quantized


def load_optimizer(optimizer, state, is_moment=is_dense, place=None):
    """The moments of a checkpoint into an AdamW or a Muon; its rates and decay stay as they are. KeyError or another
    error where they are not those of its parameters. place(i, moment): what to keep of one, of parameter i."""
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    needed = {"momentum_buffer"} if isinstance(optimizer, torch.optim.Muon) else {"exp_avg", "exp_avg_sq", "step"}
    for moments in state["state"].values():
        if needed - moments.keys() or not all(is_moment(m) and m.is_floating_point() for m in moments.values()):
            raise KeyError("of another kind")
    if place is not None:
        placed = {i: {k: place(i, m) for k, m in moments.items()} for i, moments in state["state"].items()}
        state = state | {"state": placed}
    optimizer.load_state_dict(state)
    for group, ours in zip(optimizer.param_groups, options):
        group.update(ours)
    for p, moments in optimizer.state.items():
        # the fused step writes through pointers, wherever they lead
        layouts = {k: ((), ()) if k == "step" else (p.shape, p.stride()) for k in moments}
        if any((m.shape, m.stride()) != layouts[k] for k, m in moments.items()):
            raise LookupError("an optimizer state of another shape")


def export(model, out_dir):
    """model.safetensors, with its config and a checksum; a tied head is stored once, as the embedding."""
    from safetensors.torch import save

    weights = {k: v.cpu().contiguous() for k, v in model.state_dict().items()}
    if model.config.embedding == "tied":
        del weights["lm_head.weight"]
    model_args = json.dumps(asdict(model.config))
    metadata = {"model_args": model_args, "crc32": checksum(weights, model_args)}
    write_atomically(os.path.join(out_dir, "model.safetensors"), lambda f: f.write(save(weights, metadata)))


def check_archive(path):
    """Raise ValueError where what torch.load would read has changed: it does not look at the checksums that torch.save
    writes, and reads zeros where a record is marked as a folder. Files older than the archives have none."""
    with open(path, "rb") as f:
        if f.read(4) == b"PK\x03\x04":
            with zipfile.ZipFile(f) as archive:
                if archive.testzip() or any(record.external_attr & 0x10 for record in archive.infolist()):
                    raise ValueError("a checksum does not fit")


def checksum(weights, text):
    """Of tensors by name and of a text. safetensors files have none of their own."""
    crc = zlib.crc32(text.encode())
    for name, w in sorted(weights.items()):
        crc = zlib.crc32(f"{name} {w.dtype} {tuple(w.shape)}".encode(), crc)
        crc = zlib.crc32(w.reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def _read_export(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        metadata, weights = f.metadata() or {}, {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    if metadata.get("crc32", "") not in ("", checksum(weights, metadata.get("model_args", ""))):
        raise ValueError("the checksum does not fit")
    if "model_args" in metadata:
        return {"model": weights, "model_args": json.loads(metadata["model_args"])}
    with open(os.path.join(os.path.dirname(path), "config.json"), encoding="utf-8") as f:  # another program's, or older
        return {"model": weights, "model_args": json.load(f)["model"]}


# -----------------------------------------------------------------------------
# checkpoints in shards: OUT_DIR/shards/ITERATION/ of a run whose processes each hold a share (parallel.py)
#
#   run.pt          what else a checkpoint holds: one without tensors
#   __R_0.distcp    the tensors of process R, in the format of torch.distributed.checkpoint
#   .metadata       where each tensor is; written last, and so the mark of a whole checkpoint


LIBRARY = "torch.distributed.checkpoint"
PICKLED = {  # what the .metadata of a checkpoint is made of
    f"{LIBRARY}.metadata": "Metadata MetadataIndex StorageMeta TensorStorageMetadata TensorProperties "
    "ChunkStorageMetadata _MEM_FORMAT_ENCODING",
    f"{LIBRARY}.filesystem": "_StorageInfo",
    "torch": "Size float64 float32 float16 bfloat16 int64 int32 uint8 bool",
    "torch.serialization": "_get_layout",
    "pathlib": "PosixPath WindowsPath",
}


class OneFile:
    """Writes checkpoints as ckpt.pt."""

    name = "ckpt.pt"

    def __init__(self, world, writer):
        self.world, self.writer = world, writer

    def save(self, folder, model, optimizers, extra):
        """The model, the optimizers {name: optimizer}, and what else there is."""
        if self.world.master:
            extra = extra | {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
            self.writer.save(os.path.join(folder, "ckpt.pt"), model, **extra)
            if os.path.isdir(os.path.join(folder, "shards")):  # from when each process held a share
                self.writer.wait()
                shutil.rmtree(os.path.join(folder, "shards"), ignore_errors=True)

    def finish(self):
        """Wait until the last one is written."""
        self.writer.wait()


class Shards:
    """Writes checkpoints in shards. One at a time is under way; the one before it goes when it is whole."""

    name = "shards"

    def __init__(self, world, group):
        """group: processes joined by gloo, for this alone: it works beside the exchanges of the steps."""
        self.world, self.group, self.pending, self.path = world, group, None, None

    def save(self, folder, model, optimizers, extra):
        """Copy the tensors of the model and of the optimizers {name: optimizer}, and go on while they are written."""
        self.finish()
        self.path = os.path.join(folder, "shards", str(extra["iter_num"]))
        tensors, names, tied = {}, {}, {}
        for name, w in model.state_dict(keep_vars=True).items():
            if names.setdefault(id(w), name) == name:
                tensors[f"model/{name}"] = w.detach()
            else:
                tied[name] = names[id(w)]
        for kind, optimizer in optimizers.items():
            state = optimizer.state_dict()
            extra = extra | {kind: {"state": {}, "param_groups": state["param_groups"]}}
            for i, moments in state["state"].items():
                tensors |= {f"{kind}/{i}/{name}": m for name, m in moments.items()}
        if self.world.master:
            shutil.rmtree(self.path, ignore_errors=True)  # of a save that was killed
            os.makedirs(self.path, exist_ok=True)
            empty = types.SimpleNamespace(config=model.config, state_dict=dict)
            save_checkpoint(os.path.join(self.path, "run.pt"), empty, tied=tied, **extra)
        self.world.max([0])
        from torch.distributed.checkpoint import async_save

        self.pending = async_save(tensors, checkpoint_id=self.path, process_group=self.group)

    def finish(self):
        """Wait until the last one is whole; the older ones go, and a ckpt.pt."""
        if self.pending is None:
            return
        from torch.distributed.checkpoint import CheckpointException

        pending, self.pending = self.pending, None
        try:
            pending.result()
        except CheckpointException as error:  # of any process: all are told
            cause = next(iter(error.failures.values()))[0]
            raise cannot_write(self.path, cause, "; the one before it is intact") from None
        if self.world.master:
            folder, kept = os.path.split(self.path)
            for name in os.listdir(folder):
                if name != kept:
                    shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(os.path.dirname(folder), "ckpt.pt"))


def read_last(folder, in_shards=False):
    """The last checkpoint of a run, as read_checkpoint gives it. in_shards: the moments stay in their files, for
    `load_moments`."""
    path, file = last_shards(folder), os.path.join(folder, "ckpt.pt")
    if path is None or (os.path.exists(file) and iteration(file) > int(os.path.basename(path))):
        return read_checkpoint(folder, "ckpt.pt")
    stored = read_checkpoint(path, "run.pt")
    stored["path"] = path
    kinds = ("model",) if in_shards else ("model", "optimizer", "muon")
    tensors = read_tensors(path, lambda kind, name, empty: empty() if kind in kinds else None)
    stored["model"] = {name: w for (kind, name), w in tensors.items() if kind == "model"}
    stored["model"] |= {name: stored["model"][other] for name, other in stored.pop("tied").items()}
    for kind in {kind for kind, _ in tensors} - {"model"}:
        stored[kind]["state"] = moments(tensors, kind)
    return stored


def moments(tensors, kind):
    """{parameter's number: {name: tensor}} of an optimizer."""
    state = {}
    for (of, name), tensor in tensors.items():
        if of == kind:
            i, _, name = name.partition("/")
            state.setdefault(int(i), {})[name] = tensor
    return state


def last_shards(folder):
    """The folder of the newest whole checkpoint in shards (parallel.py), folder/shards/ITERATION, or None."""
    numbers = []
    with contextlib.suppress(OSError):
        numbers = [int(name) for name in os.listdir(os.path.join(folder, "shards")) if name.isdecimal()]
    paths = [os.path.join(folder, "shards", str(n)) for n in sorted(numbers, reverse=True)]
    return next((p for p in paths if os.path.exists(os.path.join(p, ".metadata"))), None)


def load_moments(optimizer, stored, kind):
    """The moments of a checkpoint into an optimizer, of whole parameters or of shards; errors as of load_optimizer."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not is_part(params[0]):
        return load_optimizer(optimizer, stored.get(kind))
    if not stored[kind]["state"] and os.path.isdir(stored["path"]):  # each process reads its rows

        def part(of, name, empty):
            if of != kind:
                return None
            p = dict(enumerate(params)).get(int(name.partition("/")[0]))  # None: of other parameters, found out later
            return empty() if p is None or empty().shape != p.shape else torch.zeros_like(p)

        state = moments(read_tensors(stored["path"], part), kind)
        return load_optimizer(optimizer, stored[kind] | {"state": state}, torch.is_tensor)
    return load_optimizer(optimizer, stored[kind], place=lambda i, m: share(params[i], m) if m.dim() else m)


def is_part(tensor):
    return hasattr(tensor, "full_tensor")


def share(part, whole):
    """This process's rows of a tensor, as it has them of a parameter."""
    from torch.distributed.tensor import distribute_tensor

    placed = distribute_tensor(whole.to(part.device), part.device_mesh, part.placements, src_data_rank=None)
    return torch.empty_like(part, dtype=whole.dtype).copy_(placed)  # not a view that keeps all of it


def read_tensors(path, wanted):
    """{(kind, name): tensor} of a checkpoint in shards: for each tensor there is, what wanted(kind, name, empty) gives
    to be filled, such as empty(), or None to leave it. ModelError where a file is damaged."""
    from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load

    class Reader(FileSystemReader):
        def read_metadata(self, *args, **options):  # theirs would run what code a foreign file names
            with open(os.path.join(path, ".metadata"), "rb") as f:
                return Unpickler(f).load()

    try:
        reader, found = Reader(path), {}
        for key, entry in reader.read_metadata().state_dict_metadata.items():
            make = functools.partial(torch.empty, entry.size, dtype=entry.properties.dtype)
            tensor = wanted(*key.split("/", 1), make)
            if tensor is not None:
                found[key] = tensor
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no group is asked: each process reads for itself
            load(found, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise ModelError(f"{path}: not a readable checkpoint (damaged, or not of this repository)") from None
    return {tuple(key.split("/", 1)): tensor for key, tensor in found.items()}


class Unpickler(pickle.Unpickler):
    """Reads where the tensors are, and nothing else."""

    def find_class(self, module, name):
        if name not in PICKLED.get(module, "").split():
            raise pickle.UnpicklingError(f"{module}.{name} in .metadata")
        return super().find_class(module, name)


def iteration(file):
    """That of a ckpt.pt, whose tensors stay on disk; -1 where it cannot be read."""
    with contextlib.suppress(Exception):
        return int(torch.load(file, weights_only=True, mmap=True)["iter_num"])
    return -1


# -----------------------------------------------------------------------------
# from one model into another


@dataclass
class LoadReport:
    """What a load did: names copied, names the model has and the file lacks, names the file has and the model lacks."""

    copied: list
    new: list
    left: list

    def __str__(self):
        in_part = [name for name in self.copied if "[" in name]
        every = sorted(set(layer_numbers(self.copied + self.new + self.left)))
        lists = {"in part": in_part, "new (not in the file)": self.new, "left (not in the model)": self.left}
        parts = [f"copied {len(self.copied)} tensors"]
        for title, names in lists.items():
            layers = {}
            for name in names:
                layers.setdefault(re.sub(r"\.h\.\d+\.", ".h.*.", name), []).extend(layer_numbers([name]))
            listed = [n if sorted(i) == every else n.replace("*", ",".join(map(str, i))) for n, i in layers.items()]
            parts += [f"{title}: {', '.join(listed)}"] if names else []
        return "; ".join(parts)


def layer_numbers(names):
    return [int(i) for name in names for i in re.findall(r"\.h\.(\d+)\.", name)]


@torch.no_grad()
def load_weights(model, weights, source):
    """Copy into `model` each tensor of `weights` that fits by name, shape and meaning. Returns a LoadReport. `source`,
    the config of the model that the weights are from, says what their rows and numbers mean."""
    with torch.device("meta"):
        theirs = dict(type(model)(source).named_modules())
    ours, own = dict(model.named_modules()), model.state_dict()  # `own` shares storage with the parameters
    copied, left, new = [], [], []
    for name, value in weights.items():
        module, _, parameter = name.rpartition(".")
        layer = module.removesuffix(".c_attn")
        if name in own and value.is_floating_point() != own[name].is_floating_point():
            raise ModelError(f"{name} is of {value.dtype}, in a model it is of {own[name].dtype}: damaged weights")
        if name not in own:
            left.append(name)
        elif layer != module and not same_rows(own[name], ours[layer], value, theirs.get(layer)):
            taken, missing, rest = copy_projections(ours[layer], own[name], value, theirs.get(layer))
            for parts, names in ((taken, copied), (missing, left), (rest if taken else [], new)):
                names += [f"{name}[{','.join(parts)}]"] if parts else []
        else:
            value = value[: len(own[name])] if parameter == "weight" and layer.endswith("wpe") else value
            fits = own[name].shape == value.shape and same_meaning(ours[module], theirs.get(module), parameter)
            if fits:
                own[name].copy_(value)
            (copied if fits else left).append(name)
    for name in found(model, copied):
        if not own[name].isfinite().all():
            raise ModelError(f"{name} holds what is not a finite number: damaged weights, take another checkpoint")
    return LoadReport(copied, [name for name in own if name not in found(model, copied)] + new, left)


def found(model, copied):
    """The names that were copied, in whole or in part. A tied head and its embedding are one tensor."""
    names = {name.partition("[")[0] for name in copied}
    tied = {"lm_head.weight", "transformer.wte.weight"} if model.config.embedding == "tied" else set()
    return names | tied if names & tied else names


def same_rows(own, attn, value, theirs):
    """Whether a fused projection of both attentions has the same parts, in the same order and of the same sizes."""
    return own.shape == value.shape and attn.parts == getattr(theirs, "parts", {})


def same_meaning(ours, theirs, parameter):
    """Whether both layers compute the same from this number. A layer that does not say means what its name says."""
    ours, theirs = (getattr(layer, "meaning", {}).get(parameter) for layer in (ours, theirs or ours))
    return ours == theirs


def copy_projections(attn, own, value, theirs):
    """The rows of q, k and v of a softmax layer's c_attn, `value` (rows, C) or its bias (rows,), into `own`, where
    `attn` has parts of that size under these names; kv_BRANCH takes keys and values. Returns three lists: the parts of
    `attn` that were copied, the parts of `value` that were left, and the parts of `attn` that were not in it."""
    if [*getattr(theirs, "parts", {})] != [*"qkv"]:
        return [], [*"qkv"], []
    q, k, v = value.split(list(theirs.parts.values()))
    source, taken = {"q": q, "k": k, "v": v, "kv": value[len(q) :]}, []
    for part, rows in zip(attn.parts, own.split(list(attn.parts.values()))):
        wanted = source.get(part.split("_")[0])
        if wanted is not None and wanted.shape == rows.shape:
            rows.copy_(wanted)
            taken.append(part)
    missing = [part for part in "qkv" if not any(part in other.split("_")[0] for other in taken)]
    return taken, missing, [part for part in attn.parts if part not in taken]
