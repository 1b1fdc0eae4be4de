"""What a step will need, from shapes alone: parameters, memory, operations. Nothing is allocated."""

import contextlib
from collections import Counter

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import config
from model import param_groups, turns

MEMORY = ("weights", "gradients", "optimizer state", "activations")
OLD = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")  # files and a name of cgroups of version 1


def needs(model_config, make, batch=None):
    """Figures of a step by name: parameters of each group, bytes (MEMORY), operations of a sequence's forward pass.
    `make(model_config)` gives the objective and its optimizers. batch: (sequences, tokens of each), and where only some
    tokens are scored, how many; None leaves out activations and operations.

    Layers of a type are alike: one of each, and another of it, say what any number of them adds up to."""
    layers = Counter(model_config.types()[: model_config.n_layer])
    kinds = list(dict.fromkeys(model_config.types()))  # those of the layers first; a pattern may be longer than they

    def of(pattern, n_layer):
        return measure(config.override(model_config, attention_type=",".join(pattern), n_layer=n_layer), make, batch)

    one_each = of(kinds, len(layers))
    total = dict(one_each)
    for kind in (kind for kind, n in layers.items() if n > 1):
        one_more = of([kind, *kinds], len(layers) + 1)
        for name in total:
            total[name] += (layers[kind] - 1) * (one_more[name] - one_each[name])
    return total


def measure(model_config, make, batch):
    """The figures of `needs`, counted on a whole model."""
    saved = {}

    def remember(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode():
        objective, optimizers = make(model_config)
        model = objective.model
        count = {name: sum(p.numel() for _, p in members) for name, members in param_groups(model).items()}
        moved = [(o, p.numel()) for o in optimizers for group in o.param_groups for p in group["params"]]
        state = sum(n * (1 if isinstance(o, torch.optim.Muon) else 2) for o, n in moved)
        numbers = (sum(count.values()), sum(n for _, n in moved), state)
        figures = count | {name: 4 * n for name, n in zip(MEMORY, numbers)}
        if batch is None:
            return figures
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        tokens, targets = (torch.zeros(batch[:2], dtype=torch.long) for _ in range(2))
        places = (tokens[:, :n] for n in batch[2:])
        try:
            with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
                objective((tokens, targets, *places))
        finally:
            turns.cache_clear()  # of tensors that hold nothing
    for block in model.transformer.h:  # operations follow what masks keep: their first values
        block.attn.make_masks(model.config)
    nominal, executed = model.flops(batch[1])
    activations = sum(size for storage, size in saved.items() if storage not in own)
    return figures | {"activations": activations, "nominal": nominal, "executed": executed}


def dry_run(model_config, make, cfg, length, *scored):
    """Print the figures of a step over sequences of `length` tokens, all of them `scored` or so many."""
    found = needs(model_config, make, (cfg.batch_size, length, *scored))
    count = {name: found[name] for name in ("matrix", "vector", "mask")}
    state = sum(found[name] for name in MEMORY[:3])
    sequences = cfg.batch_size * cfg.gradient_accumulation_steps
    nominal, executed = (3 * sequences * found[name] / 1e9 for name in ("nominal", "executed"))
    print(f"parameters: {sum(count.values()):,} (" + ", ".join(f"{k} {v:,}" for k, v in count.items()) + ")")
    print(f"memory: {state / 1e6:,.0f} MB of weights, gradients and optimizer state, ", end="")
    print(f"{found['activations'] / 1e6:,.0f} MB of activations in float32")
    print(f"step: {sequences * length:,} tokens, {nominal:,.1f} GFLOP nominal, {executed:,.1f} executed")


def refusal(model_config, make, cfg, length, runtime, micro_steps, made=False, shares=1, scored=()):
    """Why a run cannot fit this machine, or None: it may, or nothing is known. made: the weights are there already.
    shares: processes among which gradients and optimizer state are divided.

    What is compared is less than a step takes: weights and optimizer state with what stands beside them at once. Of
    activations only those that eager code keeps on a CPU, half of them under autocast; a GPU says itself, in one line,
    that it is full, and no system ends the process for it."""
    free = free_memory(runtime.device)
    if free is None:
        return None
    counted = runtime.device_type == "cpu" and not runtime.compile and cfg.distill == "none"
    width = max(model_config.n_embd, model_config.mlp_hidden) + length  # above what a type keeps, with T x T maps too
    rough = 250 * cfg.batch_size * length * (model_config.n_layer * width + (model_config.vocab_size or 2**17))
    try:
        found = needs(model_config, make)
        state = sum(found[name] for name in MEMORY[:3])
        if counted and 2 * (state + rough) > free:
            found = needs(model_config, make, (cfg.batch_size, length, *scored))
    except (RuntimeError, OverflowError) as error:  # sizes beyond any; or a type of a plugin that needs its numbers
        return f"no machine has the memory: {str(error).splitlines()[0]}" if "overflow" in str(error) else None
    found |= {name: found[name] // shares for name in ("gradients", "optimizer state")}
    kept = found.get("activations", 0) // (1 if runtime.dtype == "float32" else 2)
    beside = (found["gradients"], kept)  # of one micro-batch, the gradients come while the activations go
    least = found["optimizer state"] + (max(beside) if micro_steps == 1 else sum(beside))
    least += 0 if made else found["weights"]
    if least <= free:
        return None
    parts = ", ".join(f"{found[name] / 1e6:,.0f} of {name}" for name in MEMORY if name in found)
    less = "batch_size, block_size or the model" if kept > found["gradients"] else "n_layer, n_embd or vocab_size"
    return (
        f"a step needs {least / 1e6:,.0f} MB of memory or more ({parts}), {free / 1e6:,.0f} MB are free: lower {less}"
    )


def free_memory(device):
    """Bytes that a process may still take; None where this is unknown: on a Mac, on Windows."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    system = table("/proc/meminfo")
    if device != "cpu" or "MemAvailable" not in system:
        return None
    return min(1024 * system["MemAvailable"], *cgroup_rooms(), 2**63) + 1024 * system.get("SwapFree", 0)


def cgroup_rooms(root="/sys/fs/cgroup", of="/proc/self/cgroup"):
    """What the control groups of this process and those above them leave, of version 1 or 2: the limit less what is
    used, but for cached files, which the kernel drops when their place is needed."""
    for _, controllers, path in (line.split(":", 2) for line in read(of).splitlines()):
        if controllers and "memory" not in controllers.split(","):
            continue
        folder, limit, used, cached = root, "memory.max", "memory.current", "file"
        if controllers:
            folder, limit, used, cached = f"{root}/memory", *OLD
        parts = path.strip("/").split("/")
        for place in ("/".join([folder, *parts[:n]]) for n in range(len(parts) + 1)):
            most, now = (read(f"{place}/{name}").strip() for name in (limit, used))
            if most.isdigit() and now.isdigit():  # "max": no limit
                yield int(most) - int(now) + table(f"{place}/memory.stat").get(cached, 0)


def table(path):
    """{name: number} of a file with a name and a number in each line."""
    lines = (line.replace(":", " ").split() for line in read(path).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def read(path):
    with contextlib.suppress(OSError, UnicodeDecodeError), open(path, encoding="utf-8") as f:
        return f.read()
    return ""
