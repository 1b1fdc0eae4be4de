"""Attention types from outside model.py: `register`, --plugin of each script, and what is said of a wrong one."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import test_attention
import torch
from conftest import ROOT

import bench
import compare
import model
import plugins
import sample
import train
from benchmarks import comparison
from config import ConfigError
from model import ATTENTION, GPT, GPTConfig, NoAttention, register
from weights import ModelError, read_checkpoint

README = (Path(ROOT) / "README.md").read_text(encoding="utf-8")
DECAY = re.search(r"```python\n(# my_attention.py\n.*?)```", README, re.S)[1]  # as printed there


@pytest.fixture(autouse=True)
def registry():
    """What a test registers and imports is gone after it."""
    before, imported, registered = dict(ATTENTION), set(plugins.imported), set(plugins.registered)
    modules = set(sys.modules)
    forget()
    yield
    for found, kept in ((ATTENTION, before), (plugins.imported, imported), (plugins.registered, registered)):
        found.clear()
        found.update(kept)
    for name in set(sys.modules) - modules:
        if name.startswith("plugin_"):
            del sys.modules[name]


def forget():
    """As in a process that has not imported a plugin."""
    for name in plugins.registered:
        del ATTENTION[name]
    plugins.registered.clear()
    plugins.imported.clear()


@pytest.fixture
def plugin(tmp_path):
    """The README's file."""
    path = tmp_path / "my_attention.py"
    path.write_text(DECAY, encoding="utf-8")
    return path


# a type from a file


def test_the_readmes_own_attention_obeys_the_protocol(plugin, fresh_rng, products, tiny, tmp_path):
    plugins.import_plugins(str(plugin))
    test_attention.test_step_equals_forward_over_any_split("decay", "none", fresh_rng)
    test_attention.test_strictly_causal_and_rows_apart("decay", "none", fresh_rng)
    test_attention.test_gradients_reach_every_parameter("decay", fresh_rng)
    test_attention.test_operations_are_counted("decay")
    test_attention.test_executed_operations_are_those_of_the_products("decay", {}, fresh_rng, products)
    test_attention.test_a_resumed_run_is_the_same_run("decay", tiny, tmp_path)


def test_the_notebooks_own_attention_obeys_the_protocol(fresh_rng, products):
    tour = json.loads((Path(ROOT) / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in tour["cells"] if cell["cell_type"] == "code"]
    exec(next(c for c in cells if "class LinearAttention" in c), vars(model) | {"__name__": "__main__"})
    test_attention.test_step_equals_forward_over_any_split("linear", "none", fresh_rng)
    test_attention.test_strictly_causal_and_rows_apart("linear", "none", fresh_rng)
    test_attention.test_gradients_reach_every_parameter("linear", fresh_rng)
    test_attention.test_dropout_acts_in_training("linear", fresh_rng)
    test_attention.test_operations_are_counted("linear")
    test_attention.test_executed_operations_are_those_of_the_products("linear", {}, fresh_rng, products)


@pytest.mark.slow  # the README's commands do this too
def test_the_protocol_tests_take_a_plugin(plugin):
    """As the README has it, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_attention.py"]
    command += ["-k", "decay and (operations or stats)", f"--plugin={plugin}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout
    done = subprocess.run([*command[:-1], "--plugin=none.py"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "none.py: No such file" in done.stderr and "Traceback" not in done.stderr


def test_train_resume_sample_and_measure(plugin, tiny, tmp_path, capsys):
    own = [f"--plugin={plugin}"]
    line = tiny(attention_type="decay,softmax")
    folder = tmp_path / "run"
    assert train.main([*line, *own, "--max_iters=10"]) == 0
    for name in ("best.pt", "ckpt.pt"):
        assert read_checkpoint(str(folder), name)["model_args"]["plugin"] == str(plugin)
    moved = tmp_path / "moved.py"
    plugin.rename(moved)
    own = [f"--plugin={moved}"]
    forget()
    assert train.main([*line, *own, "--init_from=resume", "--export"]) == 0  # the rest is as the checkpoint says
    forget()
    assert train.main([f"--out_dir={folder}", *own, "--init_from=resume", "--eval_only", *line[1:4]]) == 0
    assert read_checkpoint(str(folder), "ckpt.pt")["model_args"]["plugin"] == str(moved)
    forget()
    capsys.readouterr()
    for file in ("", "ckpt.pt", "model.safetensors"):
        forget()
        argv = [f"--out_dir={folder}", f"--checkpoint={file}", "--start=word", "--max_new_tokens=5", "--device=cpu"]
        assert sample.main([*argv, *own]) == 0
        assert capsys.readouterr().out.startswith("word")
    forget()
    options = [f"--json={tmp_path / 'bench.json'}", f"--png={tmp_path / 'bench.png'}", "--device=cpu"]
    assert bench.main(["--what=quality", f"--out_dir={folder}", "--split=val", *options, *own]) == 0
    forget()
    small = ["--lengths=16,32", "--rounds=1", "--seconds=0.01", "--n_embd=32", "--n_head=2"]
    assert bench.main(["--attention_type=softmax,decay", *small, *options, *own]) == 0
    assert "decay" in (tmp_path / "bench.json").read_text()


def test_a_plugin_changes_nothing_else(plugin, tiny, tmp_path):
    """The weights of a run without it."""
    weights = []
    for folder, own in ((tmp_path / "a", []), (tmp_path / "b", [f"--plugin={plugin}"])):
        assert train.main([*tiny(out_dir=folder, max_iters=3, lr_decay_iters=3), *own]) == 0
        weights.append(read_checkpoint(str(folder), "ckpt.pt")["model"])
    assert all(torch.equal(w, weights[1][name]) for name, w in weights[0].items())


def test_a_config_file_names_a_plugin(plugin, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"plugin = {str(plugin)!r}\nattention_type = 'decay'\nn_layer = 1\nn_embd = 32\nn_head = 2\n")
    assert train.config.load([str(path)], GPTConfig)[0].types() == ["decay"]
    forget()
    _, runs, _ = compare.plan([str(path), "--attention_type=all"])
    assert [run.model.attention_type for run in runs] == list(ATTENTION) and "decay" in ATTENTION


def test_several_plugins_and_one_that_runs_once(plugin, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from model import ATTENTION, register\n"
        "@dataclass\nclass State:\n    n: int = 0\n"
        "class Slower(ATTENTION['decay']):\n    slowest = 9.0\n"
        "register('slower', Slower)\n"
    )
    both = f"{plugin}, {other}"
    for _ in range(2):
        found, _ = train.config.load([f"--plugin={both}", "--attention_type=decay,slower", "--n_layer=2"], GPTConfig)
    decays = [block.attn.decay for block in GPT(dataclasses.replace(found, vocab_size=8)).transformer.h]
    assert [round(d.max().item()) for d in decays] == [6, 9]


# compare.py


@pytest.mark.slow  # the README's commands do this too
def test_compare_passes_a_plugin_on(plugin, text_dataset, tmp_path, capsys):
    """The runs are processes of their own. An edit of the plugin makes new runs of its types alone."""
    shape = dict(device="cpu", dtype="float32", n_layer=1, n_head=2, n_embd=32, block_size=16, batch_size=4)
    line = shape | dict(max_iters=4, warmup_iters=1, eval_interval=2, eval_iters=1, dataset=text_dataset, seed="1")
    line = [f"--{k}={v}" for k, v in (line | dict(out_dir=tmp_path / "all", attention_type="softmax,decay")).items()]

    def folders():
        forget()
        status = compare.main([*line, f"--plugin={plugin}"])
        out = capsys.readouterr().out
        assert status == 0, out
        return {path.parent.name for path in (tmp_path / "all").glob("*/recipe.json")}, out

    before, out = folders()
    assert len(before) == 2 and re.search(r"^\W*\**decay", out, re.M)
    assert folders()[1].count("done before") == 2
    plugin.write_text(DECAY + "# a comment is no change\n", encoding="utf-8")
    assert folders()[0] == before
    plugin.write_text(DECAY.replace("slowest = 6.0", "slowest = 5.0"), encoding="utf-8")
    (new,) = folders()[0] - before
    assert new.startswith("decay")


def test_the_hash_has_the_plugin_of_its_types(plugin):
    plugins.import_plugins(str(plugin))
    config = dict(n_layer=2, n_embd=32, n_head=2, plugin=str(plugin))
    assert comparison.plugins_of(GPTConfig(**config)) == ()
    assert comparison.plugins_of(GPTConfig(attention_type="softmax,decay", **config)) == (str(plugin),)
    assert comparison.code() != comparison.code((str(plugin),))
    register("alias", ATTENTION["gla"])
    assert comparison.plugins_of(GPTConfig(attention_type="alias", **config)) == (str(plugin),)


# what is wrong


def refusal(call, *arguments, error=ConfigError):
    with pytest.raises(error) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Complete(NoAttention):
    pass


@pytest.mark.parametrize(
    "name, cls, want",
    [
        ("softmax", Complete, "register('softmax', ...): the name is taken by SoftmaxAttention: write another"),
        ("a,b", Complete, "a name is letters"),
        ("all", Complete, "a name is letters"),
        (3, Complete, "a name is letters"),
        ("mine", torch.nn.Linear, "is not a class that extends Attention"),
        ("mine", "Complete", "is not a class that extends Attention"),
        ("mine", type("Mine", (model.Attention,), {}), "Mine lacks __init__, forward, init_state, step, flops"),
        ("mine", type("Mine", (Complete,), {"step": model.Attention.step}), "Mine lacks step"),
        ("mine", type("Mine", (Complete,), {"__init__": lambda self: None}), "made by __init__(self, config)"),
    ],
)
def test_register_refuses(name, cls, want):
    before = dict(ATTENTION)
    assert want in refusal(register, name, cls)
    assert before == ATTENTION


def test_a_cell_may_register_again():
    register("mine", Complete)
    assert refusal(register, "mine", Complete).endswith("write another, or register with replace=True")
    edited = type("Edited", (Complete,), {})
    register("mine", edited, replace=True)
    assert ATTENTION["mine"] is edited
    assert refusal(register, "gla", edited, True).endswith("taken by GatedLinearAttention: write another")


WRONG = {
    "from model import register\nclass A(": "plugin {path}, line 2: '(' was never closed",
    "x = 1\n": 'plugin {path} registers nothing: end it with register("NAME", CLASS), from model',
    "x = 1\nx.y\n": "plugin {path}, line 2: AttributeError: 'int' object has no attribute 'y'",
    "import nowhere_at_all\n": "plugin {path}, line 1: ModuleNotFoundError: No module named 'nowhere_at_all'",
    "raise SystemExit(3)\n": "plugin {path}: it exits; a plugin defines attention types and registers them",
    "from model import *\nclass A(Attention):\n  def __init__(self, config):\n    super().__init__()\n"
    "register('a', A)\n": "plugin {path}, line 5: register('a', ...): A lacks forward, init_state, step, flops; "
    "Attention in model.py states each",
    "from model import *\nregister('gla', NoAttention)\n": "plugin {path}, line 2: register('gla', ...): the name is "
    "taken by GatedLinearAttention: write another",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_plugins(text, tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(text)
    for main in (train.main, sample.main, bench.main, compare.main):
        assert refusal(main, [f"--plugin={path}"]) == WRONG[text].format(path=path)


def test_files_that_are_no_plugins(tmp_path, plugin):
    near = tmp_path / "my_atention.py"
    hint = f"plugin {near}: No such file or directory; did you mean {plugin}?"
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe\x00")
    for main in (train.main, sample.main, bench.main, compare.main):
        assert refusal(main, [f"--plugin={near}"]) == hint
        assert refusal(main, ["--plugin=x"]) == "plugin x: not a Python file; write --plugin=my_attention.py"
        assert "Is a directory" in refusal(main, [f"--plugin={tmp_path / 'folder.py'}"])
        assert "not a text file" in refusal(main, [f"--plugin={tmp_path / 'bytes.py'}"])


def test_a_wrong_plugin_ends_a_script_in_one_line(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text("x = 1\n")
    command = [sys.executable, os.path.join(ROOT, "sample.py"), f"--plugin={path}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"sample.py: plugin {path} registers nothing")


def test_a_checkpoint_names_its_plugin_and_never_runs_it(plugin, tiny, tmp_path):
    marker, folder = tmp_path / "ran", str(tmp_path / "run")
    assert train.main([*tiny(attention_type="decay", max_iters=2, export=True), f"--plugin={plugin}"]) == 0
    plugin.write_text(DECAY + f"open({str(marker)!r}, 'w')\n", encoding="utf-8")
    forget()
    want = f"attention_type: no type 'decay' yet: add --plugin={plugin}, the file that registers it (or import it)"
    dataset = tiny()[1]
    calls = [
        (train.main, [f"--out_dir={folder}", dataset, "--init_from=resume", "--eval_only"]),
        (train.main, [f"--out_dir={tmp_path / 'new'}", dataset, f"--init_from={folder}"]),
        (sample.main, [f"--out_dir={folder}"]),
        (sample.main, [f"--out_dir={folder}", "--checkpoint=model.safetensors"]),
        (sample.main, [f"--compare={folder}"]),
        (bench.main, ["--what=quality", f"--out_dir={folder}", "--json="]),
        (GPT.from_checkpoint, folder),
    ]
    for call, argument in calls:
        assert refusal(call, argument, error=ModelError).endswith(want)
    assert not marker.exists()
    # a type that a checkpoint has from a notebook, a type of no plugin, and a plugin without it
    generic = "or add the --plugin=FILE of your own"
    assert refusal(train.main, ["--attention_type=decay"]).endswith(generic)
    assert refusal(train.main, ["--attention_type=new", f"--plugin={plugin}"]).endswith(generic) and marker.exists()
    stored = read_checkpoint(folder)
    stored["model_args"] |= {"plugin": "x.py; rm -r ~", "attention_type": "gone"}
    assert "add --plugin='x.py; rm -r ~', the" in refusal(model.stored_config, stored, error=ModelError)


def test_a_model_gives_all_logits_without_targets(fresh_rng):
    gpt = GPT(GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=32)).eval()
    idx = torch.randint(11, (2, 9))
    logits, loss = gpt(idx, all_positions=True)
    assert loss is None and torch.equal(logits, gpt(idx, idx)[0])
    torch.testing.assert_close(logits[:, -1:], gpt(idx)[0])
