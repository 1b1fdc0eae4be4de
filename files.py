"""The folder of a run: files are replaced whole, one run writes at a time, a new one takes an earlier one's place."""

import contextlib
import os
import shutil

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

RUN_FILES = ("config.json", "log.jsonl", "best.pt", "ckpt.pt", "model.safetensors")  # of one run


class TrainError(RuntimeError):
    """A run that cannot go on; the message is one line."""


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


def place_new_run(out_dir):
    """Put a new run in the earlier one's place, once it has saved. A start and a save call this. What a kill leaves:

    .new/ without ckpt.pt   the earlier run is whole; the new one has saved nothing
    .new/ with ckpt.pt      the new run is whole; the earlier one's files are on their way to previous/
    .placing/               the earlier run is whole in previous/; the new one's files are on their way to out_dir
    none of them            the run in out_dir is whole
    """

    def move(source, target):
        for name in RUN_FILES:
            if os.path.exists(os.path.join(source, name)):
                os.replace(os.path.join(source, name), os.path.join(target, name))

    new, placing, previous = (os.path.join(out_dir, name) for name in (".new", ".placing", "previous"))
    if os.path.exists(os.path.join(new, "ckpt.pt")):
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
