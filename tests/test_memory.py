"""What a step needs, from shapes alone; a run that cannot fit is refused; what is free."""

import functools
import types

import pytest
import torch

import config
import memory
import train
from model import ATTENTION, GPT, GPTConfig
from train import Objective, TrainConfig, TrainError

CPU = config.resolve_device("cpu", "float32")
PATTERNS = [*ATTENTION, "softmax,none", "gla,gla,softmax,adaptive_span", "nsa,mask_mix,none,none,none,none"]


def shape(attention_type, **keys):
    sizes = dict(n_layer=5, n_head=2, n_embd=16, block_size=32, vocab_size=40, attention_type=attention_type)
    return GPTConfig(**(sizes | keys))


def outline(**keys):
    return functools.partial(train.outline, TrainConfig(**keys), None)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_layers_of_a_type_are_counted_once(pattern):
    """Each figure is that of the whole model, digit for digit."""
    for keys, sizes in (
        ({}, dict(pos_emb="rope", embedding="untied", bias=True, dropout=0.1)),
        (dict(optimizer="muon", activation_checkpointing=True), dict(n_layer=4)),
    ):
        make, shaped = outline(**keys), shape(pattern, **sizes)
        assert memory.needs(shaped, make, (3, 20)) == memory.measure(shaped, make, (3, 20))


@pytest.mark.parametrize("pattern, dropout", [*((pattern, 0.0) for pattern in PATTERNS), ("softmax", 0.1)])
def test_figures_are_those_of_a_real_step(pattern, dropout):
    """Parameters, state and what the graph keeps, against a model that is made and run."""
    found = memory.needs(shape(pattern, dropout=dropout), outline(optimizer="muon"), (3, 32))
    gpt = GPT(shape(pattern, dropout=dropout)).train()
    own, kept, held = {p.untyped_storage().data_ptr() for p in gpt.parameters()}, {}, []

    def remember(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)  # its address is taken
        return tensor

    batch = torch.randint(40, (3, 32)), torch.randint(40, (3, 32))
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        loss, _ = Objective(gpt)(batch)
    assert found["activations"] == sum(size for address, size in kept.items() if address not in own)
    assert found["weights"] == found["gradients"] == sum(4 * p.numel() for p in gpt.parameters())
    loss.backward()
    optimizers = train.make_optimizers(gpt, TrainConfig(optimizer="muon"), "cpu")
    for optimizer in optimizers:
        optimizer.step()
    state = [m for o in optimizers for moments in o.state.values() for m in moments.values() if m.dim()]
    assert found["optimizer state"] == sum(4 * m.numel() for m in state)


def test_what_is_frozen_has_no_gradients():
    for part in ("all", "masks", "attention"):
        gpt = GPT(shape("adaptive_span"))
        train.freeze(gpt, part)
        moved = sum(p.numel() for p in gpt.parameters() if p.requires_grad)
        found = memory.needs(shape("adaptive_span"), outline(train_only=part))
        assert (found["gradients"], found["optimizer state"]) == (4 * moved, 8 * moved)


def test_ten_thousand_layers_take_three_models(tiny, monkeypatch, capsys):
    made = []
    build = GPT.__init__
    monkeypatch.setattr(GPT, "__init__", lambda self, config: (made.append(config.n_layer), build(self, config))[1])
    assert train.main(tiny(dry_run=True, n_layer=10000, attention_type="gla,none")) == 0
    assert made == [2, 3, 3]
    n = 5000 * sum(p.numel() for p in GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=256,
                                                    attention_type="gla,none")).transformer.h.parameters())  # fmt: skip
    assert f"parameters: {n + 32 + 256 * 32 + 16 * 32:,} (" in capsys.readouterr().out


def refused(free, monkeypatch, runtime=CPU, micro_steps=1, made=False, **keys):
    """The line, or None, on a machine with so many bytes free."""
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    cfg = TrainConfig(batch_size=8, **keys)
    make = functools.partial(train.outline, cfg, None)
    return memory.refusal(shape("softmax", n_embd=64), make, cfg, 32, runtime, micro_steps, made)


def test_a_run_is_refused_where_its_least_is_not_free(monkeypatch):
    """To the byte: the moments, the weights, and the larger of gradients and activations, or both of them."""
    found = memory.needs(shape("softmax", n_embd=64), outline(), (8, 32))
    weights, gradients, state, activations = (found[name] for name in memory.MEMORY)
    assert activations > gradients
    cases = {
        weights + state + activations: {},
        weights + state + activations + gradients: dict(micro_steps=2),
        state + activations: dict(made=True),
        weights + state + max(gradients, activations // 2): dict(runtime=config.resolve_device("cpu", "bfloat16")),
        weights + state + gradients: dict(runtime=config.resolve_device("cpu", "float32", True)),
    }
    for least, keys in cases.items():
        assert refused(least, monkeypatch, **keys) is None
        line = refused(least - 1, monkeypatch, **keys)
        assert line.startswith(f"a step needs {least / 1e6:,.0f} MB of memory or more (") and "are free: lower " in line
    assert refused(None, monkeypatch) is None
    compiled = config.resolve_device("cpu", "float32", True)
    assert refused(2.2 * weights, monkeypatch, compiled) is not None
    assert refused(2.2 * weights, monkeypatch, compiled, train_only="attention") is None


def test_a_run_that_cannot_fit_ends_before_it_makes_anything(tiny, tmp_path, monkeypatch):
    with pytest.raises(TrainError, match=r"a step needs [\d,]+ MB of memory or more .* MB are free: lower batch_size"):
        train.main(tiny(batch_size=10**7, max_iters=1))
    assert not (tmp_path / "run" / ".new").exists()
    train.main(tiny(max_iters=1))
    with pytest.raises(TrainError, match="MB are free: lower batch_size"):
        train.main(tiny(init_from="resume", batch_size=10**7))
    with pytest.raises(TrainError, match="no machine has the memory"):
        train.main(tiny(n_embd=2**31 - 1, n_head=1, n_layer=1))


def test_the_estimate_leaves_the_run_as_it_is(tiny, tmp_path, monkeypatch):
    """Where the sum is near what is free, shapes are traced first: cached tables and random numbers do not mind."""
    keys = dict(max_iters=2, pos_emb="rope")
    train.main(tiny(out_dir=tmp_path / "plain", **keys))
    called, needs = [], memory.needs
    monkeypatch.setattr(memory, "needs", lambda *a: (called.append(len(a)), needs(*a))[1])
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**7)
    from model import turns

    turns.cache_clear()
    train.main(tiny(**keys))
    assert called == [2, 3]
    plain, run = (torch.load(tmp_path / name / "ckpt.pt")["model"] for name in ("plain", "run"))
    assert all(torch.equal(plain[name], run[name]) for name in plain)


def test_one_process_without_memory_ends_all(monkeypatch):
    monkeypatch.setattr(memory, "refusal", lambda *a: None)
    world = types.SimpleNamespace(size=1, max=lambda values: [1])
    dataset = types.SimpleNamespace(lengths=lambda block_size: (block_size,))
    with pytest.raises(TrainError, match="another process"):
        train.check_memory(TrainConfig(), world, CPU, dataset, shape("softmax"))


MEMINFO = "MemTotal:       16000 kB\nMemAvailable:    9000 kB\nSwapTotal: 100 kB\nSwapFree:         50 kB\n"


def group(folder, limit, used, stat="", names=("memory.max", "memory.current")):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip((*names, "memory.stat"), (limit, used, stat)):
        (folder / name).write_text(content)


def test_what_a_control_group_leaves(tmp_path):
    group(tmp_path / "a", "5000\n", "4000\n", "anon 10\nfile 700\n")
    group(tmp_path / "a" / "b", "max\n", "9\n")
    old = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    group(tmp_path / "memory", "9223372036854771712\n", "1\n", names=old)
    group(tmp_path / "memory" / "a", "800\n", "300\n", "cache 9\ntotal_cache 20\n", names=old)
    of = tmp_path / "of"
    for text, rooms in (("0::/a/b\n", [1700]), ("4:memory:/a\n3:cpuset:/\n", [9223372036854771711, 520]), ("", [])):
        of.write_text(text)
        assert list(memory.cgroup_rooms(str(tmp_path), of)) == rooms


def test_what_is_free(monkeypatch):
    texts = {"/proc/meminfo": MEMINFO}
    monkeypatch.setattr(memory, "read", lambda path: texts.get(path, ""))
    assert memory.free_memory("cpu") == 1024 * 9050 and memory.free_memory("mps") is None
    texts |= {"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "700\n", "/sys/fs/cgroup/memory.current": "9"}
    assert memory.free_memory("cpu") == 691 + 1024 * 50
    texts.clear()  # a Mac, Windows
    assert memory.free_memory("cpu") is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456))
    assert memory.free_memory("cuda:1") == 123
