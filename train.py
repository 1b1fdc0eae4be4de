"""Train a GPT: one run, in the order it happens.

    python train.py config/train_stdlib.py --max_iters=500             # one process
    torchrun --nproc_per_node=2 train.py config/train_enwik8.py        # one process a GPU
    python train.py config/train_stdlib.py --init_from=resume          # go on from out_dir/ckpt.pt
    python train.py config/train_stdlib.py --init_from=resume --eval_only

In out_dir: config.json, log.jsonl (a line for each logged iteration and each evaluation), ckpt.pt (the last state, to
resume), best.pt (the weights with the lowest validation loss, once penalties have their full weight; of a student those
with the lowest divergence and penalty after its first step). Ctrl-C or SIGTERM finishes the step and saves. A new run
moves the files of an earlier one to out_dir/previous/, once it has a checkpoint of its own.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

if __name__ == "__main__":  # Ctrl-C while modules load is no traceback of theirs
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn as nn

import config
import formats
import memory
import parallel
import weights
from config import ConfigError, key, printable
from data import Batches, DataError, Dataset, make_bar, scoring, windows
from data.scoring import compare_with_teacher, describe_comparison, estimate_loss, evaluate, print_scores
from kernels.divergence import kl_divergence
from model import GPT, GPTConfig, cross_entropy, param_groups, stored_config
from weights import ModelError, TrainError, read_checkpoint

MAX_BAD_STEPS = 5  # non-finite steps in a row that end a run
SPIKE_WINDOW, SPIKE_LEAST, SPIKE_ROW = 100, 20, 5  # see SpikeGuard


@dataclass
class TrainConfig:
    """Training"""

    out_dir: str = key("", "folder of the run; empty: out/CONFIG-ATTENTION_TYPE, with + for commas")
    init_from: str = key("scratch", "scratch | resume | gpt2, gpt2-medium, ... | a folder with weights to start from")
    dataset: str = key("stdlib", "a data set of data/, or the folder of a prepared one")
    batch_size: int = key(12, "sequences of a micro-batch, for each process", low=1)
    gradient_accumulation_steps: int = key(1, "micro-batches of a step, over all processes", low=1)
    max_iters: int = key(5000, "optimizer steps", low=0)
    max_seconds: float = key(0.0, "time over all resumes by the clock, evaluating and saving too; 0: no limit", low=0.0)
    optimizer: str = key("adamw", "muon moves the matrices of the blocks, AdamW the rest", choices=("adamw", "muon"))
    learning_rate: float = key(6e-4, "peak learning rate of AdamW", low=0.0)
    muon_learning_rate: float = key(0.02, "peak learning rate of Muon", low=0.0)
    mask_learning_rate: float = key(0.01, "peak learning rate of mask parameters (spans, periods, alphas)", low=0.0)
    min_lr: float = key(6e-5, "learning rate at the end of the decay", low=0.0)
    decay_lr: bool = key(True, "cosine decay; False: constant after the warm-up")
    warmup_iters: int = key(100, "steps of linear warm-up", low=0)
    lr_decay_iters: int = key(0, "steps until min_lr; 0: max_iters", low=0)
    weight_decay: float = key(0.1, "decay of matrices; vectors and masks have none", low=0.0)
    beta1: float = key(0.9, "AdamW", low=0.0, high=0.9999)
    beta2: float = key(0.95, "AdamW", low=0.0, high=0.999999)
    grad_clip: float = key(1.0, "gradient norm to clip to; 0: off", low=0.0)
    mask_grad_clip: float = key(0.0, "gradient norm of mask parameters to clip to; 0: off", low=0.0)
    spike_guard: float = key(0.0, "skip steps whose gradient norm is above so many times its median; 0: off", low=0.0)
    eval_interval: int = key(500, "steps between evaluations, each followed by a checkpoint", low=1)
    eval_iters: int = key(50, "fixed batches of the loss estimate during training", low=1)
    eval_only: bool = key(False, "score val and test by the full pass, then stop")
    eval_context: int | str = key(
        0, "tokens of context in the full pass, or several sizes with commas; 0: block_size", low=0
    )
    eval_stride: int = key(0, "step between its windows; 0: its context, so that windows do not overlap", low=0)
    eval_batch_size: int = key(16, "windows at once in the full pass; the figure does not depend on it", low=1)
    checkpoint_interval: int = key(0, "steps between checkpoints; 0: at evaluations only", low=0)
    export: bool | str = key(False, "weights at the end; hf: a folder for transformers", choices=(False, True, "hf"))
    log_interval: int = key(10, "steps between log lines", low=1)
    wandb_log: bool = key(False, "log to Weights & Biases as well")
    wandb_project: str = key("nanoattention", "project there")
    wandb_run_name: str = key("", "name there; empty: out_dir")
    wandb_mode: str = key("online", "mode there", choices=("online", "offline", "disabled"))
    teacher: str = key("", "model to distil: a run's folder, gpt2, ..., or a Hugging Face folder")
    distill: str = key(
        "none", "what to learn of it: its predictions, or each layer's attention", choices=("none", "kl", "attention")
    )
    distill_attention_iters: int = key(0, "steps of distill=attention before those of distill=kl", low=0)
    distill_ce: float = key(0.0, "weight of cross-entropy beside the divergence", low=0.0)
    distill_temperature: float = key(1.0, "softens both distributions of the divergence", low=0.1)
    penalty_start: int = key(0, "steps without the attention's penalty", low=0)
    penalty_warmup: int = key(0, "steps after them over which it grows to its weight", low=0)
    train_only: str = key("all", "parameters that move", choices=("all", "attention", "masks"))
    seed: int = key(1337, "seed of weights, batches and dropout", low=0, high=2**31 - 1)
    device: str = key("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = key("auto", "autocast precision", choices=("auto", "float32", "bfloat16", "float16"))
    parallel: str = key("ddp", "the whole model in each process of torchrun, or a share", choices=("ddp", "fsdp"))
    peer_timeout: int = key(600, "seconds that a process waits for another before the run ends", low=1)
    compile: bool | None = key(None, "torch.compile; None: on CUDA only")
    activation_checkpointing: bool = key(False, "recompute blocks in the backward pass: less memory, a third slower")
    dry_run: bool = key(False, "print parameters, memory and operations of a step, then stop")

    def __post_init__(self):
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr:g} is above learning_rate={self.learning_rate:g}")
        if self.eval_stride > scoring.context_sizes(self.eval_context)[0] > 0:
            raise ValueError(f"eval_stride={self.eval_stride} would skip tokens: eval_context is {self.eval_context}")
        if 0 < self.spike_guard <= 1:
            raise ValueError(f"spike_guard={self.spike_guard:g} would skip every second step: write more than 1, or 0")
        if (self.distill == "none") != (not self.teacher):
            raise ValueError("distill=kl or distill=attention needs teacher=FOLDER, and a teacher needs one of them")
        if self.distill == "attention" and self.train_only == "all":
            raise ValueError("distill=attention moves attention alone: write train_only=attention, or masks")
        if self.distill_attention_iters and self.distill != "kl":
            raise ValueError("distill_attention_iters are steps before those of distill=kl")


class Objective(nn.Module):
    """What a step minimises, and its parts, all scalars. DDP and compile wrap this: nothing bypasses their hooks.

        ce + penalty                                     cross-entropy in nats, and the attention's penalties
        t^2 KL(teacher || student) + w ce + penalty      with a teacher: t softens both, at the same positions
        error + penalty                                  matching: each layer's attention, fed what the teacher's is fed

    The parts are detached by the reader: compiled, a detach here takes the loss's gradient too."""

    def __init__(self, model, teacher=None, temperature=1.0, ce_weight=0.0, answers=None):
        """answers: None, or of records the ids that may be one, whose accuracy is among the parts then."""
        super().__init__()
        self.model, self.teacher, self.answers = model, teacher, answers
        self.temperature, self.ce_weight = temperature, ce_weight

    def forward(self, batch, matching=False, share=1.0, weight=1.0):
        """`share` of the penalty counts, and the means over scored targets `weight` times: numbers, or tensors where
        they change from call to call."""
        idx, targets, *places = batch  # (B, T) each; of records (B, n), the positions that need logits
        if matching:
            error, penalty = self.attention_error(idx)
            penalty = share * penalty
            return error + penalty, {"attention_error": error, "penalty": penalty}
        targets = scoring.at(targets, *places)
        x, penalty = self.model.hidden(idx)
        penalty = share * penalty
        logits = self.model.lm_head(scoring.at(x, *places))
        ce = weight * cross_entropy(logits, targets)
        parts = {"ce": ce, "penalty": penalty}
        if self.answers is not None:
            parts["accuracy"] = weight * scoring.accuracy(logits, targets, self.answers)
        if self.teacher is None:
            return ce + penalty, parts
        with torch.no_grad():
            wanted = self.teacher.lm_head(scoring.at(self.teacher.hidden(idx)[0], *places))
        kl = weight * kl_divergence(wanted, logits, targets, self.temperature)
        loss = self.temperature**2 * kl + penalty
        if self.ce_weight:  # else its backward pass would be one of zeros
            loss = loss + self.ce_weight * ce
        return loss, parts | {"kl": kl}

    def attention_error(self, idx):
        """Mean over the layers of |y - y_teacher|^2 / |y_teacher|^2, y the attention's output; and the penalties."""
        error, penalty = 0.0, 0.0
        entries, outputs = zip(*self.teacher.trace(idx))
        for (y, p), wanted in zip(self.model.attend(entries), outputs):
            error = error + (y - wanted).float().square().sum() / wanted.float().square().sum()
            penalty = penalty + p
        return error / len(self.model.transformer.h), penalty


@dataclass
class Progress:
    """Where a run stands; all of it is in the checkpoint."""

    iter_num: int = 0
    best_val_loss: float = math.inf
    tokens: int = 0
    seconds: float = 0.0  # in steps
    clock: float = 0.0  # since the run began, without the time between two processes
    evaluation: float = 0.0  # the last one's seconds
    wandb_id: str = ""


@dataclass
class SpikeGuard:
    """Which gradient norms are spikes: those of more than `factor` times the median of the last SPIKE_WINDOW norms that
    were none, from SPIKE_LEAST on. More than SPIKE_ROW in a row are a new level: the median begins anew."""

    norms: list
    skipped: int = 0
    row: int = 0

    def is_spike(self, norm, factor):
        if len(self.norms) >= SPIKE_LEAST and norm > factor * statistics.median(self.norms):
            self.row += 1
            if self.row <= SPIKE_ROW:
                self.skipped += 1
                return True
            self.norms = []
        self.row, self.norms = 0, [*self.norms, norm][-SPIKE_WINDOW:]
        return False


# -----------------------------------------------------------------------------
# model and optimizer


def make_model(cfg, model_config, given, dataset):
    """The model that `init_from` names, its checkpoint dict when it resumes (else None), and a line that describes it.

    A checkpoint or GPT-2 decides the shape; keys given explicitly replace its values, except on resume, where a
    different model is an error."""
    explicit = config.explicit(model_config, given)
    if cfg.init_from == "scratch":
        model = GPT(config.override(model_config, vocab_size=model_config.vocab_size or dataset.vocab_size))
        return model, None, f"a new model of {model.num_params():,} parameters"
    if cfg.init_from == "resume":
        return resume_model(cfg, explicit, given)
    if not os.path.isdir(cfg.init_from) and not cfg.init_from.startswith("gpt2"):
        raise ConfigError(f"init_from={cfg.init_from}: neither scratch, resume, gpt2... nor a folder")
    ours = weights.is_training_folder(cfg.init_from)
    model = (GPT.from_checkpoint if ours else GPT.from_pretrained)(cfg.init_from, **explicit)
    if not model.loaded.copied:
        raise ModelError(f"init_from={cfg.init_from}: none of its tensors has a place in a model of these sizes")
    return model, None, f"{cfg.init_from}: {model.loaded}"


def load_teacher(cfg, model):
    """The frozen model that `teacher` names, in eval mode; it must read the student's tokens, at all its positions."""
    ours = weights.is_training_folder(cfg.teacher)
    if not ours and not os.path.isdir(cfg.teacher) and not cfg.teacher.startswith("gpt2"):
        raise ConfigError(f"teacher={cfg.teacher}: neither a folder nor gpt2...")
    teacher = (GPT.from_checkpoint if ours else GPT.from_pretrained)(cfg.teacher).eval().requires_grad_(False)
    same = ["vocab_size"]
    if cfg.distill == "attention" or cfg.distill_attention_iters:
        same += ["n_layer", "n_embd"]
        if not any(p.requires_grad for block in model.transformer.h for p in block.attn.parameters()):
            raise ConfigError("the student has no attention to match: write --distill_attention_iters=0, --distill=kl")
        if "none" in teacher.config.types():
            raise ConfigError(f"teacher={cfg.teacher} has layers without attention: there is nothing to match in them")
    for name in same:
        theirs, mine = getattr(teacher.config, name), getattr(model.config, name)
        if theirs != mine:
            raise ConfigError(f"teacher={cfg.teacher} has {name}={theirs}, the student {mine}: write --{name}={theirs}")
    if teacher.config.pos_emb == "learned" and teacher.config.block_size < model.config.block_size:
        raise ConfigError(f"teacher={cfg.teacher} ends at block_size={teacher.config.block_size}: write that, or less")
    return teacher


def freeze(model, train_only):
    """Only the attention, or only its masks, keep their gradients."""
    if train_only == "all":
        return
    masks = {id(p) for _, p in param_groups(model)["mask"]}
    attention = {id(p) for block in model.transformer.h for p in block.attn.parameters()}
    chosen = masks if train_only == "masks" else attention
    for p in model.parameters():
        p.requires_grad_(id(p) in chosen)
    if not chosen:
        raise ConfigError(f"train_only={train_only}: attention_type={model.config.attention_type} has none to train")


def resume_model(cfg, explicit, given):
    folders = [os.path.join(cfg.out_dir, name) for name in (".new", ".placing", "")]  # the first two after a kill
    folder = next((f for f in folders if weights.has_saved(f)), cfg.out_dir)
    stored = weights.read_last(folder, cfg.eval_only or parallel.is_sharded(cfg))
    model_config = stored_config(stored)
    weights.check_stored(stored, lambda: GPT(model_config))
    for name, value in explicit.items():
        if name == "vocab_size" and value == 0:
            continue
        if name in ("dropout", "plugin"):  # a plugin may have moved
            model_config = config.override(model_config, **{name: value})
        elif value != getattr(model_config, name):
            was = getattr(model_config, name)
            raise ConfigError(f"{name}={value} ({given[name]}), but the checkpoint in {cfg.out_dir} has {name}={was}")
    model = GPT(model_config)
    report = weights.load_weights(model, stored["model"], model_config)
    return model, stored, f"resumed from {stored['path']} at iteration {stored.get('iter_num', 0)}: {report}"


def trainable(model):
    """The parameter groups without what is frozen."""
    return {name: [p for _, p in members if p.requires_grad] for name, members in param_groups(model).items()}


def make_optimizers(model, cfg, device_type):
    """AdamW over the parameter groups, or with optimizer=muon Muon for the blocks' matrices and AdamW for the rest.
    Each group remembers its peak rate in `peak_lr`."""
    groups = trainable(model)
    optimizers = []
    if not any(groups.values()):
        raise ModelError("the model has no parameters to train")
    if cfg.optimizer == "muon" and any(p.dim() == 2 for p in model.transformer.h.parameters()):
        inner = {id(p) for p in model.transformer.h.parameters()}
        hidden = [p for p in groups["matrix"] if id(p) in inner and p.dim() == 2]
        groups["matrix"] = [p for p in groups["matrix"] if not any(p is other for other in hidden)]
        if hidden:
            muon = [{"params": hidden, "peak_lr": cfg.muon_learning_rate}]
            optimizers.append(torch.optim.Muon(muon, lr=cfg.muon_learning_rate, weight_decay=cfg.weight_decay))
    rates = {"matrix": cfg.learning_rate, "vector": cfg.learning_rate, "mask": cfg.mask_learning_rate}
    members = [
        {"params": params, "peak_lr": rates[name], "weight_decay": cfg.weight_decay if name == "matrix" else 0.0}
        for name, params in groups.items()
        if params
    ]
    if members:
        options = dict(betas=(cfg.beta1, cfg.beta2), fused=device_type in ("cpu", "cuda"))
        optimizers.insert(0, torch.optim.AdamW(members, lr=cfg.learning_rate, **options))
    return optimizers


def lr_factor(cfg, it):
    """Share of the peak rate at step `it` (from 0): linear warm-up, never 0, then a cosine to min_lr, or constant."""
    if it < cfg.warmup_iters:
        return (it + 1) / (cfg.warmup_iters + 1)
    if not cfg.decay_lr or cfg.learning_rate == 0:
        return 1.0
    end = cfg.lr_decay_iters or cfg.max_iters
    done = min(1.0, (it - cfg.warmup_iters) / max(1, end - cfg.warmup_iters))
    floor = cfg.min_lr / cfg.learning_rate
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def penalty_share(cfg, it):
    """Share of the attention's penalty that counts at step `it` (from 0)."""
    if it < cfg.penalty_start:
        return 0.0
    return min(1.0, (it - cfg.penalty_start + 1) / (cfg.penalty_warmup + 1))


def compile_objective(objective, batch, runtime):
    """The compiled objective and the seconds its first step took, or the eager one and why. Gradients and random
    numbers are as before."""
    start, rng = time.perf_counter(), torch.get_rng_state()
    try:
        compiled = torch.compile(objective)
        with runtime.autocast():
            loss, _ = compiled(batch)
        loss.backward()
    except Exception as error:  # the compiler, its C++ compiler or Triton: the run goes on without
        torch._dynamo.reset()
        return objective, f"eager: torch.compile failed ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
    finally:
        objective.zero_grad(set_to_none=True)
        torch.set_rng_state(rng)
    return compiled, f"compiled in {time.perf_counter() - start:.1f} s"


# -----------------------------------------------------------------------------
# evaluation


def full_evaluation(model, dataset, cfg, runtime, world, teacher=None):
    """The full pass over val and test, printed, at each size of the context, with a table and a figure where there are
    several; returns the rows. With a teacher, both compared on the same windows."""
    sizes, beyond = scoring.within_positions(scoring.context_sizes(cfg.eval_context), model, teacher)
    if not sizes:
        raise ConfigError(f"eval_context={cfg.eval_context}: {beyond}")
    rows, share = [], (world.rank, world.size)
    splits = [name for name in ("val", "test") if name in dataset.meta["splits"]]
    for size, name in itertools.product(sizes, splits):
        context, stride = scoring.eval_window(model, dataset, size, cfg.eval_stride)
        start, split = time.perf_counter(), dataset.split(name)
        with progress_bar(split.n_scored, f"{name}", "token", world) as bar:
            how = (context, stride, cfg.eval_batch_size, runtime, share, world.sum, bar)
            rows.append(evaluate(model, split, *how))
        if world.master:
            print_scores(rows[-1], printable(dataset.meta["label"]), time.perf_counter() - start)
        if teacher is not None:
            passes = windows(split, context, stride, cfg.eval_batch_size)
            scored = ((x, y.masked_fill(~s, -1)) for _, x, y, s in scoring.share_of(passes, *share))
            comparison = compare_with_teacher(model, teacher, scored, runtime, world.sum)
            if world.master:
                print(f"  {describe_comparison(comparison)}")
    if len(scoring.context_sizes(cfg.eval_context)) > 1 and world.master:
        from benchmarks import extrapolation  # which imports this file

        extrapolation.show_run(cfg, model, rows, beyond)
    return rows


# -----------------------------------------------------------------------------
# logs and checkpoints


def progress_bar(total, label, unit, world, initial=0):
    """A bar on a terminal; nothing elsewhere."""
    shown = world.master and sys.stderr.isatty()
    options = dict(initial=initial, disable=not shown, dynamic_ncols=True, leave=False)
    return make_bar(total=total, desc=label, unit=unit, **options)


def git_commit():
    here = os.path.dirname(os.path.abspath(__file__))
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


# -----------------------------------------------------------------------------
# the run


class Run:
    """The state of a training run and the steps it takes."""

    def __init__(self, cfg, runtime, world, dataset, model, stored, teacher=None):
        self.cfg, self.runtime, self.world, self.dataset, self.model = cfg, runtime, world, dataset, model
        self.batches = Batches(dataset, model.config.block_size, cfg.batch_size, cfg.seed, world.rank, world.size)
        self.optimizers = make_optimizers(model, cfg, runtime.device_type)
        groups = trainable(model)
        self.masks, self.weights = groups["mask"], groups["matrix"] + groups["vector"]
        self.scaler = torch.amp.GradScaler(runtime.device_type, enabled=runtime.dtype == "float16")
        self.progress = Progress()
        self.guard = SpikeGuard([])
        self.writer = weights.Writer(beside=runtime.device_type == "cuda")  # on a CPU it would take from the steps
        self.saver = parallel.saver(cfg, world, self.writer)
        self.is_new = stored is None  # until its first checkpoint
        self.log_size = None
        if stored is not None:
            self.restore(stored)
        self.began = time.perf_counter() - self.progress.clock
        self.signal = 0
        self.bad_steps = 0
        self.penalty = 0.0  # of the last step
        model.activation_checkpointing = cfg.activation_checkpointing
        self.teacher = teacher
        answers = scoring.answer_ids(dataset, model)
        self.objective = Objective(model, teacher, cfg.distill_temperature, cfg.distill_ce, answers)
        self.micro_steps = cfg.gradient_accumulation_steps // world.size

    def restore(self, stored):
        """All that a step depends on, so that a resumed run is the same run. nanoGPT's files have no generators."""
        try:
            self._restore(stored)
        except (ModelError, torch.OutOfMemoryError):
            raise
        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise ModelError(f"{stored['path']}: damaged: {type(error).__name__}: {error}") from None

    def _restore(self, stored):
        values = {k: type(v)(stored.get(k, v)) for k, v in dataclasses.asdict(Progress()).items()}
        wrong = [k for k, v in values.items() if stored.get(k, v) != v]
        self.progress, began = Progress(**values), stored.get("config", {})
        if wrong or values["iter_num"] < 0 or not isinstance(began.get("init_from", ""), str):
            raise TypeError(f"{', '.join(wrong) or 'iteration or config'}")
        if began.get("teacher", "") != self.cfg.teacher:  # the best is by another measure
            self.progress.best_val_loss = math.inf
        self.compare(stored, began)
        # what is on record is where the run began, not that it was resumed
        self.cfg = dataclasses.replace(self.cfg, **{k: began[k] for k in ("init_from", "seed") if k in began})
        for optimizer, name in zip(self.optimizers, ("optimizer", "muon")):
            try:
                weights.load_moments(optimizer, stored, name)
            except (AttributeError, KeyError, TypeError, ValueError):
                why = f"its optimizer state is not of optimizer={self.cfg.optimizer}, train_only={self.cfg.train_only}"
                how = "--init_from=FOLDER with another --out_dir starts from its weights alone"
                raise ModelError(f"{stored['path']}: {why}; {how}") from None
        if "batches" not in stored:
            print("the checkpoint has no generator state: batches and dropout start afresh")
            return
        self.scaler.load_state_dict(stored["scaler"])
        if spikes := stored.get("spikes"):
            norms = [float(norm) for norm in spikes["norms"]]
            self.guard = SpikeGuard(norms, int(spikes["skipped"]), int(spikes["row"]))
        self.batches.load_state_dict(stored["batches"])
        self.log_size = max(0, int(stored["log_size"]))
        if len(stored["rng"]) == self.world.size:
            rng = stored["rng"][self.world.rank]
            torch.set_rng_state(rng["cpu"])
            if self.runtime.device_type == "cuda" and "cuda" in rng:
                torch.cuda.set_rng_state(rng["cuda"])

    def compare(self, stored, began):
        """Say what of the batches is not as it was; other data is another run."""
        data = self.dataset.checksums()
        before = stored.get("data", data)
        changed = sorted(name for name in {*data, *before} if data.get(name) != before.get(name))
        if changed:
            how = f"--init_from={self.cfg.out_dir} with another --out_dir starts from its weights"
            raise ModelError(f"{stored['path']}: {', '.join(changed)} of the data set changed since then; {how}")
        was = began | {"processes": len(stored.get("rng", [0] * self.world.size))}
        now = dataclasses.asdict(self.cfg) | {"processes": self.world.size}
        names = ("batch_size", "gradient_accumulation_steps", "processes")
        notes = [f"{name}={now[name]}, it was {was[name]}" for name in names if was.get(name, now[name]) != now[name]]
        notes += [f"the seed stays {was['seed']}"] if was.get("seed", now["seed"]) != now["seed"] else []
        if notes:
            self.say(f"note: {'; '.join(notes)}")

    @property
    def folder(self):
        """Where the run's files are: the earlier run's are not touched before this one has a checkpoint."""
        return os.path.join(self.cfg.out_dir, ".new") if self.is_new else self.cfg.out_dir

    def prepare(self, resolved):
        """Compile, wrap, open the log."""
        if self.runtime.compile:
            batch = scoring.with_places(self.dataset, *next(iter(self.batches.fixed("train", 1))))
            batch = tuple(t.to(self.runtime.device) for t in batch)
            self.objective, note = compile_objective(self.objective, batch, self.runtime)
            self.say(note)
        if self.world.size > 1:
            unused = bool(self.cfg.distill_attention_iters)  # matching reaches the attention only
            self.objective = parallel.wrap(self.objective, self.runtime.device, unused)
        self.log = None
        if self.world.master:
            self.log = weights.Log(self.cfg, self.folder, self.progress, self.log_size, resolved)

    def say(self, text):
        if self.world.master:
            print(printable(text), flush=True)

    def step(self):
        """One optimizer step on the mean loss over all scored targets, however they are split into micro-batches and
        processes. Returns the loss and its parts, and the gradient norm."""
        matching = self.cfg.distill == "attention" or self.progress.iter_num < self.cfg.distill_attention_iters
        for group in (g for optimizer in self.optimizers for g in optimizer.param_groups):
            group["lr"] = group["peak_lr"] * lr_factor(self.cfg, self.progress.iter_num)
        self.model.redraw(self.progress.iter_num)
        share = 1.0
        if self.cfg.penalty_start or self.cfg.penalty_warmup:  # a tensor: compiled code takes a number for a constant
            share = torch.tensor(penalty_share(self.cfg, self.progress.iter_num), device=self.runtime.device)
        terms, tokens = [], 0
        for micro, (batch, weight) in enumerate(self.micro_batches()):
            batch = tuple(t.to(self.runtime.device, non_blocking=True) for t in batch)
            parallel.exchange(self.objective, last=micro == self.micro_steps - 1)
            with self.runtime.autocast():
                loss, parts = self.objective(batch, matching, share, weight)
            tokens += batch[0].numel()
            self.scaler.scale(loss / self.micro_steps).backward()
            terms.append(torch.stack((loss, *parts.values())).detach())
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = self.clip().item()
        means = torch.stack(terms).cpu().double().mean(0)  # read once a step: each reading waits for a GPU
        *sums, tokens = self.world.sum([*means.tolist(), norm, tokens])  # of the norm too: all judge the same number
        *means, norm = (t / self.world.size for t in sums)
        self.progress.tokens += int(tokens)
        self.update(means[0], norm)
        terms = dict(zip(("loss", *parts), means)) | {"grad_norm": norm}
        self.penalty = terms["penalty"]
        return terms

    def micro_batches(self):
        """The step's batches for this process, each with its weight: its targets over those of the average batch of all
        processes. In running text all have as many; of records they are counted before the first backward pass."""
        if self.dataset.record_len is None:
            for _ in range(self.micro_steps):
                yield self.batches.batch("train"), 1.0
            return
        batches = [self.batches.batch("train") for _ in range(self.micro_steps)]
        counts = [int((y >= 0).sum()) for _, y in batches]
        (total,) = self.world.sum([sum(counts)])
        average = total / (self.micro_steps * self.world.size)
        for batch, count in zip(batches, counts):
            batch = scoring.with_places(self.dataset, *batch)
            yield batch, torch.tensor(count / average, device=self.runtime.device)  # compiled code keeps numbers

    def clip(self):
        """Clip weights and masks apart; returns the norm of all gradients before."""
        norms = []
        for params, limit in ((self.weights, self.cfg.grad_clip), (self.masks, self.cfg.mask_grad_clip)):
            norm = parallel.whole_norm(nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]))
            if limit:
                nn.utils.clip_grads_with_norm_(params, limit, norm)
            norms.append(norm)
        return torch.stack([n.to(norms[0].device) for n in norms]).norm() if self.masks else norms[0]

    def update(self, loss, norm):
        """Move the parameters unless something is not finite, or the norm is a spike; a few steps in a row that are not
        finite end the run."""
        overflow = self.scaler.is_enabled() and math.isfinite(loss) and self.scaler.get_scale() > 1
        finite = math.isfinite(loss) and math.isfinite(norm)
        number = self.progress.iter_num + 1
        if finite and self.cfg.spike_guard and self.guard.is_spike(norm, self.cfg.spike_guard):
            median = statistics.median(self.guard.norms)
            self.say(f"iteration {number}: gradient norm {norm:.4g}, the median is {median:.4g}: a spike, step skipped")
        elif finite or overflow:  # the scaler skips an overflowing step itself, and lowers its scale
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.bad_steps = 0 if finite or overflow else self.bad_steps + 1
        if self.scaler.is_enabled():
            self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.bad_steps:
            self.say(f"iteration {number}: loss {loss}, gradient norm {norm}: step skipped ({self.bad_steps} in a row)")
            if self.bad_steps >= MAX_BAD_STEPS:
                self.fail(f"{MAX_BAD_STEPS} non-finite steps in a row up to iteration {number}")

    def evaluate(self):
        """The cheap estimate, logged, and what the masks are; best.pt."""
        start, right = time.perf_counter(), {}
        losses = estimate_loss(self.model, self.batches, self.cfg.eval_iters, self.runtime, self.world, right)
        found = [f"{k} {what} {v:.4f}" for what, d in (("loss", losses), ("accuracy", right)) for k, v in d.items()]
        self.say(f"iteration {self.progress.iter_num}: {', '.join(found)}")
        comparison = {}
        if self.teacher is not None and "val" in losses:
            batches = self.batches.fixed("val", self.cfg.eval_iters)
            comparison = compare_with_teacher(self.model, self.teacher, batches, self.runtime, self.world.sum)
            self.say(f"  {describe_comparison(comparison)}")
        if "val" in losses:
            score = comparison["kl"] + self.penalty if comparison else losses["val"]
            self.keep_best(score, as_converted=bool(comparison) and self.progress.iter_num == 0)
        for split, value in losses.items() if self.log else ():
            entry = {"iter": self.progress.iter_num, "split": split, f"{split}_loss": value}
            entry |= {f"{split}_accuracy": right[split]} if split in right else {}
            entry |= comparison if split == "val" else {}
            self.log.write(**entry, wall_s=self.progress.seconds)
        stats = {f"h.{i}": parallel.stats(block) for i, block in enumerate(self.model.transformer.h)}
        stats = {f"{i}.{name}": value for i, layer in stats.items() for name, value in layer.items()}
        if stats and self.log:  # what the masks are, from parameters alone
            self.log.write(iter=self.progress.iter_num, stats=stats)
        self.progress.evaluation = time.perf_counter() - start

    def keep_best(self, score, as_converted):
        """Write best.pt where `score` is the lowest of the run: the validation loss, or of a student its divergence and
        penalty, since it gives up the one for the other. While the penalty grows each evaluation is kept and none
        counts: what is best without it is not the run's result. Nor is a student as converted, which may be its
        teacher exactly."""
        grows = penalty_share(self.cfg, max(0, self.progress.iter_num - 1)) < 1  # in the last step
        if as_converted or grows or score < self.progress.best_val_loss:
            self.progress.best_val_loss = math.inf if as_converted or grows else score
            model = parallel.whole(self.model, self.world, GPT)
            if self.world.master:
                extra = dict(iter_num=self.progress.iter_num, best_val_loss=score)
                self.writer.save(os.path.join(self.folder, "best.pt"), model, **extra)

    @torch.no_grad()
    def check_weights(self):
        """Raise TrainError unless the weights are finite, and their loss on the next batch: no others are saved."""
        position = self.batches.state_dict()
        self.model.eval()  # no dropout: random numbers stay as they are
        x, y = (t.to(self.runtime.device) for t in self.batches.batch("train"))
        loss = scoring.token_nats(self.model, x, y, y >= 0, self.runtime)
        self.model.train()
        self.batches.load_state_dict(position)
        largest = nn.utils.get_total_norm(parallel.own_weights(self.model), math.inf).item()
        what = f"a loss of {loss}" if math.isfinite(largest) else "weights that are not finite"
        if self.world.max([not math.isfinite(loss + largest)])[0]:
            self.fail(f"iteration {self.progress.iter_num} left {what}")

    def fail(self, what):
        path = os.path.join(self.cfg.out_dir, self.saver.name)
        last = "nothing was saved" if self.is_new else f"the last good checkpoint is {path}"
        raise TrainError(f"{what}; {last}; lower learning_rate")

    def save(self):
        """ckpt.pt, or shards: all that `restore` reads."""
        if self.bad_steps:  # the weights may be what made the steps bad: the checkpoint before stays
            return
        rng = {"cpu": torch.get_rng_state()}
        if self.runtime.device_type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state()
        rng = self.world.gather(rng)
        self.progress.clock = time.perf_counter() - self.began
        extra = dataclasses.asdict(self.progress) | {"rng": rng, "batches": self.batches.state_dict()}
        extra |= {"spikes": dataclasses.asdict(self.guard), "scaler": self.scaler.state_dict()}
        extra |= {"config": dataclasses.asdict(self.cfg), "data": self.dataset.checksums()}
        extra["log_size"] = self.log.size() if self.log else 0
        optimizers = dict(zip(("optimizer", "muon"), self.optimizers))
        self.saver.save(self.folder, self.model, optimizers, extra)
        if self.is_new:
            self.saver.finish()
        if self.is_new and self.world.master:
            weights.place_new_run(self.cfg.out_dir)
            self.log.folder = self.cfg.out_dir
        self.is_new = False

    def stop_reason(self):
        """0, or the signal that all processes have seen, or -1 when the time is used up, but for a last evaluation."""
        clock = time.perf_counter() - self.began
        out_of_time = 0 < self.cfg.max_seconds <= clock + self.progress.evaluation
        number, late = self.world.max([self.signal, int(out_of_time)])
        return int(number) or (-1 if late else 0)

    def train(self):
        """Steps until max_iters, max_seconds or a signal; returns the exit status."""
        cfg, progress, stop = self.cfg, self.progress, 0
        self.model.train()
        if self.is_new:
            self.check_weights()
            self.evaluate()
            self.save()
        if progress.iter_num >= cfg.max_iters > 0:
            self.say(f"already at iteration {progress.iter_num}: a larger --max_iters would train on")
        with progress_bar(cfg.max_iters, "train", "it", self.world, progress.iter_num) as bar:
            since, steps, before = time.perf_counter(), 0, progress.tokens
            while progress.iter_num < cfg.max_iters and not stop:
                start = time.perf_counter()
                terms = self.step()
                progress.seconds += time.perf_counter() - start
                progress.iter_num, steps = progress.iter_num + 1, steps + 1
                bar.update()
                stop = self.stop_reason()
                if progress.iter_num % cfg.log_interval == 0 or progress.iter_num == cfg.max_iters:
                    ms = 1000 * (time.perf_counter() - since) / steps
                    self.log_step(terms, ms, (progress.tokens - before) / steps, bar)
                    since, steps, before = time.perf_counter(), 0, progress.tokens
                at_end = progress.iter_num == cfg.max_iters or stop == -1
                evaluates = progress.iter_num % cfg.eval_interval == 0 or at_end
                if evaluates or stop or (cfg.checkpoint_interval and progress.iter_num % cfg.checkpoint_interval == 0):
                    self.check_weights()
                    if evaluates:
                        self.evaluate()
                    self.save()
                if progress.iter_num % cfg.eval_interval == 0:
                    since, steps, before = time.perf_counter(), 0, progress.tokens
        self.writer.wait()
        if self.bad_steps:
            raise TrainError(f"the last {self.bad_steps} steps were not finite and were skipped; lower learning_rate")
        if stop > 0:
            name = signal.Signals(stop).name
            self.say(f"{name}: stopped after iteration {progress.iter_num}, saved to {cfg.out_dir}")
            return 128 + stop
        return 0

    def log_step(self, terms, ms, tokens_per_step, bar):
        if self.log is None:
            return
        rate, lr = tokens_per_step / ms * 1000, self.optimizers[0].param_groups[0]["lr"]
        entry = dict(lr=lr, ms=ms, tokens_per_s=rate, tokens=self.progress.tokens, cpu_s=time.process_time())
        entry |= dict(wall_s=self.progress.seconds, **weights.peak_memory(self.runtime.device_type))
        entry |= {"skipped": self.guard.skipped} if self.cfg.spike_guard else {}
        self.log.write(iter=self.progress.iter_num, **terms, **entry)
        parts = {k: v for k, v in terms.items() if k not in ("loss", "grad_norm") and (v or k != "penalty")}
        extra = f" ({', '.join(f'{k} {v:.4f}' for k, v in parts.items())})" if len(parts) > 1 else ""
        line = f"iter {self.progress.iter_num}: loss {terms['loss']:.4f}{extra}, grad norm {terms['grad_norm']:.2f}, "
        line += f"lr {lr:.2e}, {ms:.0f} ms, {rate:,.0f} tokens/s"
        line += f", {self.guard.skipped} skipped" if self.guard.skipped else ""
        if bar.disable:
            self.say(line)
        else:
            bar.write(line)


def outline(cfg, dataset, model_config):
    """The objective of a run, without its teacher, and its optimizers: what memory.py adds up, from shapes alone."""
    model = GPT(config.override(model_config, vocab_size=model_config.vocab_size or dataset.vocab_size))
    model.activation_checkpointing = cfg.activation_checkpointing
    freeze(model, cfg.train_only)
    return Objective(model), make_optimizers(model, cfg, "meta")


def check_memory(cfg, world, runtime, dataset, model_config, made=False):
    """Raise TrainError, in all processes, where one of them cannot hold its run."""
    if cfg.eval_only:
        return
    make, (length, *scored) = functools.partial(outline, cfg, dataset), dataset.lengths(model_config.block_size)
    steps = cfg.gradient_accumulation_steps // world.size
    shares = world.size if parallel.is_sharded(cfg) else 1
    reason = memory.refusal(model_config, make, cfg, length, runtime, steps, made, shares, scored)
    if world.max([reason is not None])[0]:
        raise TrainError(reason or "another process of the group lacks memory")


def default_folder(argv, attention_type):
    """A folder for each config file, the last one named, and attention type."""
    files = [argument for argument in argv if not argument.startswith("-")]
    stem = os.path.basename(files[-1]).removesuffix(".py") if files else "train"
    return os.path.join("out", f"{stem}-{attention_type.replace(' ', '').replace(',', '+')}")


def main(argv):
    model_config, cfg, given = config.load(argv, GPTConfig, TrainConfig)
    if not cfg.out_dir:
        cfg = config.override(cfg, out_dir=default_folder(argv, model_config.attention_type))
    with parallel.processes(cfg.device, cfg.peer_timeout) as (world, device):
        return train(model_config, cfg, given, world, device)


def train(model_config, cfg, given, world, device):
    if cfg.gradient_accumulation_steps % world.size:
        steps = cfg.gradient_accumulation_steps
        raise ConfigError(f"gradient_accumulation_steps={steps} must be a multiple of the {world.size} processes")
    for name in ("teacher", "init_from"):  # a new run replaces the checkpoints in its folder
        folder = getattr(cfg, name)
        writes = folder not in ("scratch", "resume") and not cfg.eval_only and not cfg.dry_run
        if writes and os.path.isdir(folder) and os.path.realpath(folder) == os.path.realpath(cfg.out_dir):
            raise ConfigError(f"out_dir={cfg.out_dir} is the folder of {name}: write another, it would be replaced")
    if cfg.eval_only and cfg.init_from == "scratch" and weights.is_training_folder(cfg.out_dir):
        raise ConfigError(f"--eval_only would score a new model, not that of {cfg.out_dir}: add --init_from=resume")
    runtime = config.resolve_device(device, cfg.dtype, cfg.compile, training=not cfg.eval_only)
    dataset = Dataset(cfg.dataset)
    if cfg.dry_run:
        if cfg.init_from != "scratch":
            folder = cfg.out_dir if cfg.init_from == "resume" else cfg.init_from
            if not weights.is_training_folder(folder):
                raise ConfigError(f"--dry_run adds up a new model or a run's: {folder} holds no checkpoint of train.py")
            model_config = stored_config(read_checkpoint(folder), **config.explicit(model_config, given))
        make = functools.partial(outline, cfg, dataset)
        memory.dry_run(model_config, make, cfg, *dataset.lengths(model_config.block_size))
        return 0
    with contextlib.ExitStack() as stack:
        if world.master and (cfg.export or not cfg.eval_only):  # reading needs no lock
            if cfg.init_from != "resume":
                os.makedirs(cfg.out_dir, exist_ok=True)
            if os.path.isdir(cfg.out_dir):
                stack.enter_context(weights.lock_folder(cfg.out_dir))
                weights.place_new_run(cfg.out_dir)
        world.max([0])  # the other processes read what is in order now
        launch = parallel.launchers(world)
        cfg = parallel.restarted(cfg, world, launch)
        return work(model_config, cfg, given, world, runtime, dataset, launch)


def work(model_config, cfg, given, world, runtime, dataset, launch=()):
    """Make the model, then score or train it. Returns the exit status."""
    fits = functools.partial(check_memory, cfg, world, runtime, dataset)
    if cfg.init_from == "scratch":
        fits(model_config)
    torch.manual_seed(cfg.seed)
    model, stored, what = make_model(cfg, model_config, given, dataset)
    if cfg.init_from != "scratch":
        fits(model.config, made=True)
    if model.config.vocab_size < dataset.vocab_size:
        raise ConfigError(f"vocab_size={model.config.vocab_size} is below the {dataset.vocab_size} of {cfg.dataset}")
    formats.check_export(cfg.export, model, dataset.codec)
    runtime = config.as_it_began(runtime, cfg, stored)
    cfg = config.override(cfg, dtype=runtime.dtype)  # on record
    freeze(model, cfg.train_only)
    if parallel.is_sharded(cfg):
        parallel.shard(model, runtime.device, cfg.distill == "attention" or cfg.distill_attention_iters)
    model.to(runtime.device)
    teacher = load_teacher(cfg, model).to(runtime.device) if cfg.teacher else None
    torch.manual_seed(cfg.seed + 1 + world.rank)  # dropout differs between processes, initial weights do not
    if world.master:
        print(f"{printable(what)}\n{runtime}\ndata: {printable(dataset.meta['label'])}", flush=True)
        if unaware := model.config.without_positions():
            print(f"note: {', '.join(unaware)}: no positions there, pos_emb=rope does not reach them", flush=True)
        if runtime.device_type == "cpu" and (advice := config.advise_threads()):
            print(f"note: {advice}", flush=True)
    if cfg.eval_only:
        full_evaluation(model, dataset, cfg, runtime, world, teacher)
        export(model, cfg, world, dataset)
        return 0
    run = Run(cfg, runtime, world, dataset, model, stored, teacher)
    del stored  # its weights
    resolved = {"model": dataclasses.asdict(model.config), "train": dataclasses.asdict(run.cfg)}
    resolved |= {"data": dataset.meta, "commit": git_commit(), "torch": torch.__version__}
    resolved |= {"launch": launch} if launch else {}
    if world.master:
        if run.is_new:
            shutil.rmtree(run.folder, ignore_errors=True)
            os.mkdir(run.folder)
        path, text = os.path.join(run.folder, "config.json"), json.dumps(resolved, indent=1)
        weights.write_atomically(path, lambda f: f.write(text.encode()))
    run.prepare(resolved)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, frame: setattr(run, "signal", received))
    status = 1
    try:
        status = run.train()
        run.saver.finish()
    except TrainError:
        run.saver.finish()
        raise
    finally:
        if run.log is not None:
            run.log.close(status)
        run.writer.wait()
    if status == 0:
        export(model, cfg, world, dataset)
    return status


def export(model, cfg, world, dataset):
    model = parallel.whole(model, world, GPT) if cfg.export else None
    if model is not None:
        formats.export(cfg.export, model, cfg.out_dir, dataset.codec)


if __name__ == "__main__":
    config.run(main, DataError, ModelError, TrainError)
