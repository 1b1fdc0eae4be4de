"""Continue a prompt with a trained checkpoint, or with GPT-2; or label it with one that classifies.

    python sample.py --out_dir=out --start="The history of" --max_new_tokens=300
    python sample.py --out_dir=out --start=FILE:prompt.txt --num_samples=4 --temperature=0.7 --top_p=0.9
    python sample.py --init_from=gpt2 --start="Once upon a time"
    python sample.py --out_dir=out/classify_stdlib --start=FILE:module.py
    python sample.py --compare=out/teacher,out/student --start=FILE:prompts.txt --out=compared.md

One sample is printed as it is drawn; several are drawn in one batch and printed one after the other. With --compare
several checkpoints continue the same prompts, the lines of a prompt file, from the same seed, side by side. A model
trained on records with labels answers with the label of the prompt and the probability of each.
"""

import codecs
import html
import itertools
import json
import os
import shutil
import signal
import sys
import textwrap
import time
from dataclasses import dataclass

if __name__ == "__main__":  # Ctrl-C while modules load is no traceback of theirs
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

import config
from config import ConfigError, key, printable
from data import DataError, Dataset, get_codec
from model import GPT
from plugins import import_plugins
from weights import ModelError, is_training_folder

LONGEST = 1 << 24  # characters of a prompt file; a device has no end


@dataclass
class SampleConfig:
    """Sampling"""

    out_dir: str = key("out", "folder of the run")
    init_from: str = key("checkpoint", "checkpoint (of out_dir), or gpt2, gpt2-medium, ..., or a Hugging Face folder")
    checkpoint: str = key("", "file in out_dir; empty: best.pt, else ckpt.pt, else model.safetensors")
    compare: str = key("", "runs, gpt2, ... or Hugging Face folders, comma-separated: their continuations side by side")
    out: str = key("", "Markdown file to write them to (compare)")
    plugin: str = key("", "file, or files, that register attention types of your own", act=import_plugins)
    dataset: str = key("", "data set whose codec to use; empty: the one of the run")
    start: str = key("\n", "the prompt, or FILE:path")
    num_samples: int = key(1, "continuations, drawn in one batch", low=1)
    max_new_tokens: int = key(500, "tokens of each", low=1)
    temperature: float = key(0.8, "0: greedy", low=0.0)
    top_k: int | None = key(200, "draw among the k most likely; None: all", low=1)
    top_p: float | None = key(
        None, "draw among the most likely that reach this probability; None: all", low=1e-6, high=1.0
    )
    seed: int = key(1337, "seed of the draws", low=0, high=2**31 - 1)
    use_cache: bool = key(True, "False recomputes the context for each token: slow, the same text")
    compile: bool = key(False, "torch.compile the step of one token, for types whose state does not grow with the text")
    device: str = key("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = key("auto", "autocast precision", choices=("auto", "float32", "bfloat16", "float16"))


def load(cfg, folder):
    """(model, meta): meta of the data set, as the run's config.json has it."""
    model = GPT.from_checkpoint(folder, cfg.checkpoint or None)
    if cfg.dataset:
        return model, Dataset(cfg.dataset).meta
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as f:
            meta = json.load(f)["data"]
    except FileNotFoundError:  # nanoGPT's folders have none
        if model.config.vocab_size < 50257:
            raise ConfigError(f"no {path} to name the codec: write --dataset=NAME") from None
        meta = {"codec": "gpt2"}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is damaged: write --dataset=NAME to name the codec") from None
    return model, meta


def load_gpt2(source):
    if not source.startswith("gpt2") and not os.path.isdir(source):
        raise ConfigError(f"init_from={source}: neither checkpoint, gpt2, gpt2-medium, ... nor a Hugging Face folder")
    return GPT.from_pretrained(source), {"codec": "gpt2"}


def read_prompt(start):
    """The text of --start, or of the file that it names."""
    if not start.startswith("FILE:"):
        return start
    path = start.removeprefix("FILE:")
    if not path:
        raise ConfigError("--start=FILE: names no file: write its path after the colon")
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read(LONGEST + 1)
    except UnicodeDecodeError:
        raise ConfigError(f"--start: {path} is not UTF-8 text") from None
    except ValueError as error:  # a path that no file can have
        raise ConfigError(f"--start: {path!r} is no path: {error}") from None
    if len(text) > LONGEST:
        raise ConfigError(f"--start: {path} has more than {LONGEST} characters, no prompt has")
    return text


def shown(text):
    """A model's text for stdout. A terminal would obey control characters: there all but line breaks and tabs are
    written as escapes."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c in "\n\t" else printable(c) for c in text)


def print_stream(prompt, tokens, codec):
    """Print the prompt, then each token when it comes; bytes of an unfinished character wait for the next token."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    sys.stdout.write(shown(prompt))
    for token in tokens:
        sys.stdout.write(shown(decoder.decode(codec.decode_bytes([token.item()]))))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")


def encode(model, codec, prompt, start):
    """The ids of a prompt; `start` is what --start says, to name in errors."""
    where = f"--start={start}" if start.startswith("FILE:") else "--start"
    try:
        ids = codec.encode(prompt)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if not ids:
        into = f" into {start.removeprefix('FILE:')}" if start.startswith("FILE:") else ""
        raise ConfigError(f"--start is empty: write at least one token{into}")
    if max(ids) >= model.config.vocab_size:
        raise ConfigError(f"{where}: token {max(ids)} is beyond the model's vocabulary of {model.config.vocab_size}")
    return ids


def compile_step(model, batch):
    """Let the model decode single tokens of `batch` sequences by a compiled step. Returns the seconds that it took, or
    why the model stays eager. Prompts stay eager: each length would be compiled anew."""
    growing = [name for name, block in zip(model.config.types(), model.transformer.h) if block.attn.keeps_keys]
    if growing:
        return f"eager: the state of {growing[0]} grows with the text"
    start, eager, compiled = time.perf_counter(), model.step, torch.compile(type(model).step.__wrapped__)

    def step(idx, state):
        if idx.size(1) > 1:
            return eager(idx, state)
        return compiled(model, idx.clone(memory_format=torch.contiguous_format), state)  # other strides compile anew

    try:
        with torch.inference_mode():
            token = torch.zeros(batch, 1, dtype=torch.long, device=next(model.parameters()).device)
            state = eager(token, model.init_state(batch))[1]
            for _ in range(3):  # the second position makes the compiler leave positions open
                state = step(token, state)[1]
    except Exception as error:  # the compiler or its C++ compiler
        torch._dynamo.reset()
        return f"eager: torch.compile failed ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
    model.step = step
    return f"step compiled in {time.perf_counter() - start:.1f} s"


def stream(cfg, model, codec, prompt, runtime):
    """The prompt as the codec gives it back, and the tokens (num_samples, 1) that follow, one at a time."""
    ids = encode(model, codec, prompt, cfg.start)
    if cfg.compile and cfg.use_cache and "step" not in vars(model):
        print(compile_step(model, cfg.num_samples), file=sys.stderr)
    torch.manual_seed(cfg.seed)
    idx = torch.tensor([ids], device=runtime.device).expand(cfg.num_samples, -1)
    options = dict(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, vocab_size=codec.vocab_size)
    tokens = model.stream(idx, cfg.max_new_tokens, use_cache=cfg.use_cache, **options)
    return codec.decode_bytes(ids).decode("utf-8", errors="replace"), tokens


def label_probabilities(model, ids, record_len, labels, runtime):
    """{label: probability}, the likeliest first: the model's at the last token, renormalised over the labels. A text of
    more than one record is read in records, the last of them up to its end; the mean over them is the answer."""
    length = min(record_len, len(ids))
    starts = [*range(0, len(ids) - length, length), len(ids) - length]
    records = torch.tensor([ids[s : s + length] for s in starts])
    total = 0.0
    for x in records.split(64):
        logits = model.lm_head(model.hidden(x.to(runtime.device))[0][:, -1])  # (n, V)
        total = total + logits[:, list(labels.values())].cpu().double().softmax(-1).sum(0)
    return dict(sorted(zip(labels, (total / len(starts)).tolist()), key=lambda pair: -pair[1]))


def compare(cfg, runtime):
    """The continuations of each prompt by each model, in columns on the terminal, and as Markdown tables in cfg.out."""
    names = [name.strip() for name in cfg.compare.split(",") if name.strip()]
    if not names:
        raise ConfigError("--compare names no folder: write --compare=FOLDER,FOLDER")
    text = read_prompt(cfg.start)
    prompts = [line for line in text.splitlines() if line] or [text]
    columns = []
    for name in names:
        hugging_face = os.path.exists(os.path.join(name, "config.json")) and not is_training_folder(name)
        from_hub = name.startswith("gpt2") and not os.path.isdir(name)
        model, meta = load_gpt2(name) if from_hub or hugging_face else load(cfg, name)
        if meta.get("labels"):
            raise ConfigError(f"--compare continues prompts, and {name} labels them: write --out_dir={name}")
        codec = get_codec(meta)
        model.to(runtime.device).eval()
        for prompt in prompts:
            _, tokens = stream(cfg, model, codec, prompt, runtime)
            columns.append([codec.decode(row) for row in torch.cat(list(tokens), 1).tolist()])
    width = max(20, (shutil.get_terminal_size().columns - 3 * (len(names) - 1)) // len(names))
    markdown = []
    for i, prompt in enumerate(prompts):
        rows = list(zip(*columns[i :: len(prompts)]))  # one a sample, one text a model
        print(f"{shown(prompt)}\n{side_by_side(names, width)}\n" + "-" * (width * len(names) + 3 * (len(names) - 1)))
        print("\n\n".join(side_by_side(map(shown, row), width) for row in rows) + "\n")
        markdown += [f"## {cell(prompt)}\n", "| " + " | ".join(map(cell, names)) + " |", "|---" * len(names) + "|"]
        markdown += ["| " + " | ".join(map(cell, row)) + " |" for row in rows] + [""]
    if cfg.out:
        os.makedirs(os.path.dirname(cfg.out) or ".", exist_ok=True)
        with open(cfg.out, "w", encoding="utf-8") as f:
            f.write("\n".join(markdown))
        print(f"wrote {cfg.out}")


def side_by_side(texts, width):
    """Texts wrapped into columns of `width` characters."""
    columns = [[part for line in t.splitlines() or [""] for part in textwrap.wrap(line, width) or [""]] for t in texts]
    lines = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(" | ".join(part.ljust(width) for part in line).rstrip() for line in lines)


def cell(text):
    """Text that a Markdown table holds as it is."""
    text = html.escape(text, quote=False).replace("|", "&#124;").replace("`", "&#96;").replace("*", "&#42;")
    return text.replace("\r", "").replace("\n", "<br>")


def main(argv):
    cfg, _ = config.load(argv, SampleConfig)
    runtime = config.resolve_device(cfg.device, cfg.dtype)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows another
    with torch.no_grad(), runtime.autocast():
        if cfg.compare:
            compare(cfg, runtime)
            return 0
        ours = cfg.init_from == "checkpoint"
        model, meta = load(cfg, cfg.out_dir) if ours else load_gpt2(cfg.init_from)
        codec = get_codec(meta)
        model.to(runtime.device).eval()
        if meta.get("labels"):
            text = read_prompt(cfg.start)
            ids = encode(model, codec, text.strip() if meta.get("stripped") else text, cfg.start)
            answer = label_probabilities(model, ids, meta["record_len"], meta["labels"], runtime)
            answer = {printable(label): p for label, p in answer.items()}
            print(next(iter(answer)) + "\n" + "\n".join(f"  {label:16} {p:.4f}" for label, p in answer.items()))
            return 0
        prompt, tokens = stream(cfg, model, codec, read_prompt(cfg.start), runtime)
        if cfg.num_samples == 1:
            print_stream(prompt, tokens, codec)
            return 0
        for row in torch.cat(list(tokens), 1).tolist():
            print(shown(prompt + codec.decode(row)))
            print("-" * 80)
    return 0


if __name__ == "__main__":
    config.run(main, DataError, ModelError)
