"""python bench.py: how long does a call take, how much memory, and what could the machine do at the most?"""

import copy
import functools
import itertools
import math
import os
import time

import torch

from parallel import World
from train import progress_bar
from weights import ModelError


def timed(step, seconds, device_type, pick=min, inputs=tuple):
    """Seconds of one call step(*inputs()), of the calls of about `seconds`, each timed by itself, without its inputs:
    the fastest, because what else the machine does only adds to it. On CUDA between two events, and the cache is
    overwritten before each call."""
    times, events, end = [], [], time.perf_counter() + seconds
    clock = getattr(time, clock_name(device_type, pick))
    while not (times or events) or time.perf_counter() < end:
        given = inputs()
        if device_type == "cuda":
            overwritten().zero_()
            events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            events[-1][0].record()
            step(*given)
            events[-1][1].record()
            if len(events) % 16 == 0:  # the queue must not grow, nor run empty
                torch.cuda.synchronize()
            continue
        start = clock()
        step(*given)
        if device_type == "mps":
            torch.mps.synchronize()
        times.append(clock() - start)
    if events:
        torch.cuda.synchronize()
    return pick(times or [a.elapsed_time(b) / 1000 for a, b in events])


def clock_name(device_type, pick=min):
    """One thread's processor time tells what a call costs however busy the machine is. Several threads wait for each
    other, and a whole training step for its data: the monotonic clock."""
    alone = device_type == "cpu" and torch.get_num_threads() == 1 and pick is min
    return "process_time" if alone else "perf_counter"


def replayed(call):
    """A call that is replayed as a CUDA graph, without the time that its launches take, or the call itself where it
    waits for the device, as `nsa` does."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return call
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@functools.cache
def overwritten():
    return torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda")


def interleaved(calls, rounds, seconds, runtime, label, until=math.inf, pick=min, warm=True, inputs=None):
    """{name: [seconds of a call in each round]} for {name: callable}, in the order A B C, C B A, and so on; with `warm`
    after a call of each that is not counted. No round begins after the moment `until`, but for the first two. `inputs`:
    {name: what makes the arguments of each call}, where it takes any."""
    times, first = {name: [] for name in calls}, -1 if warm else 0
    with progress_bar((rounds - first) * len(calls), label, "call", World(0, 1, 0)) as bar:
        for i in range(first, rounds):
            if i > 1 and time.perf_counter() > until:
                break
            for name in list(calls)[:: -1 if i % 2 else 1]:
                given = (inputs or {}).get(name, tuple)
                if i < 0:
                    calls[name](*given())
                else:
                    times[name].append(timed(calls[name], seconds, runtime.device_type, pick, given))
                bar.update()
    return times


def fresh(state):
    """What makes the argument of a call that decodes: a copy of the state, which a step changes, partly in place."""

    def inputs():
        with torch.inference_mode():
            return (copy.deepcopy(state),)

    return inputs


def first_calls(calls, what, report):
    """Compiling and tuning, apart from what is timed afterwards."""
    seconds = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        if report.runtime.device_type == "cuda":
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
    report.note(f"first calls, {what} included (s): " + ", ".join(f"{n} {t:.2f}" for n, t in seconds.items()))


def tolerance(report):
    return 1e-3 if report.runtime.dtype == "float32" else 5e-2


def accept(name, T, difference, report):
    if not difference < tolerance(report):  # NaN too
        raise ModelError(f"{name} at T {T}: its output is off by {difference:.1e} of its norm")


def matmul_peak(runtime, seconds):
    """Operations a second of a square product in the run's precision: the highest of many short trials."""
    size = 1024 if runtime.device_type == "cpu" else 8192
    dtype = getattr(torch, runtime.dtype)
    a, b = (torch.randn(size, size, device=runtime.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = [timed(lambda: torch.mm(a, b, out=out), seconds / 20, runtime.device_type) for _ in range(10)]
    return 2 * size**3 / min(times)


def copy_bandwidth(runtime, seconds):
    """Bytes a second, read and written, of copying what no cache holds: the highest of many short trials."""
    n = 2**26 if runtime.device_type == "cpu" else 2**30
    a, b = (torch.zeros(n, dtype=torch.uint8, device=runtime.device) for _ in range(2))
    return 2 * n / min(timed(lambda: b.copy_(a), seconds / 20, runtime.device_type) for _ in range(10))


def peak_memory(step, device_type):
    """MiB that a call takes at its peak beyond what is there before it, by PyTorch's allocator: on CUDA its counter, on
    a CPU the largest sum over the allocations and frees that the profiler saw, those inside operators included."""
    if device_type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if device_type != "cpu":
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its start and stop on stderr
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    events = [(e.start_ns(), e.nbytes()) for e in profile.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate((n for _, n in sorted(events, key=lambda e: e[0])), initial=0)) / 2**20


def state_bytes(state):
    """Bytes of all tensors in a decoding state."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, (list, tuple)):
        return sum(state_bytes(s) for s in state)
    return sum(state_bytes(s) for s in vars(state).values()) if hasattr(state, "__dict__") else 0
