"""Continue a prompt with a trained checkpoint, or with GPT-2; or label it with one that classifies.

    python sample.py --out_dir=out --start="The history of" --max_new_tokens=300
    python sample.py --out_dir=out --start=FILE:prompt.txt --num_samples=4 --temperature=0.7 --top_p=0.9
    python sample.py --out_dir=out --start=LINES:prompts.txt --stop="."
    git diff | python sample.py --out_dir=out --start=-
    python sample.py --out_dir=out --interactive
    python sample.py --init_from=gpt2 --start="Once upon a time"
    python sample.py --out_dir=out/classify_stdlib --start=FILE:module.py
    python sample.py --compare=out/teacher,out/student --start=FILE:prompts.txt --out=compared.md

One sample is printed as it is drawn; several are drawn in one batch and printed one after the other. So are those of
the prompts of a file, one a line: each prompt draws from a generator of its own with the same seed, and so continues as
it would alone. With --compare several checkpoints continue the same prompts, the lines of a prompt file, from the same
seed, side by side. A model trained on records with labels answers with the label of the prompt and the probability of
each. --interactive asks for prompts until an empty line or Ctrl-D; Ctrl-C ends a sample. Its first prompt draws from
the seed, each later one from a seed greater by one.
"""

import html
import itertools
import json
import os
import shutil
import signal
import sys
import textwrap
import time
from dataclasses import dataclass, replace

if __name__ == "__main__":  # Ctrl-C while modules load is no traceback of theirs
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from torch.utils._pytree import tree_leaves, tree_map

import config
from config import ConfigError, key, printable
from data import DataError, Dataset, get_codec
from data.scoring import label_probabilities
from data.streaming import Text
from model import GPT, DecodeState, sample_token
from plugins import import_plugins
from weights import ModelError, is_training_folder

LONGEST = 1 << 24  # characters of a prompt file; a device has no end
LARGEST = 64  # sequences of a batch of several prompts
CPU_OPTIONS = {"freezing": True, "cpp_wrapper": True}  # weights laid out for products; calls are made from C++
CUDA_OPTIONS = {"triton.cudagraphs": True, "split_reductions": False}  # one launch of all; sums are short


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
    start: str = key("\n", "the prompt, or FILE:path, or LINES:path for a prompt a line; - reads standard input")
    interactive: bool = key(False, "ask for prompt after prompt")
    num_samples: int = key(1, "continuations of each prompt, drawn in one batch", low=1)
    max_new_tokens: int = key(500, "tokens of each", low=1)
    stop: str = key("", "text before which a continuation ends; empty: none")
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
    path = os.path.join(source, "tokenizer.json")
    own = {"codec": "tokenizer", "tokenizer": path} if os.path.isfile(path) else {"codec": "gpt2"}
    return GPT.from_pretrained(source), own


def read_prompts(start, by_line=False):
    """[(text, where it is from)] of --start. Of LINES:path each line that is not empty is one; with by_line of other
    texts too, where there are any."""
    kind, colon, path = start.partition(":")
    if start == "-" or (colon and kind in ("FILE", "LINES")):
        text = read_text("-" if start == "-" else path, kind)
    else:
        kind, text = "", start
    where = f"--start={start}" if kind else "--start"
    if kind != "LINES" and not by_line:
        return [(text, where)]
    lines = [(line, f"{where}, line {n}") for n, line in enumerate(text.split("\n"), 1) if line]
    return lines or [("" if kind == "LINES" else text, where)]


def read_text(path, kind):
    """The text of a file, or of standard input."""
    if not path:
        raise ConfigError(f"--start={kind}: names no file: write its path after the colon")
    try:
        with open(0 if path == "-" else path, encoding="utf-8", closefd=path != "-") as f:
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


def print_stream(prompt, tokens, codec, stop=""):
    """Print the prompt, then each token when it comes. Returns the number of tokens."""
    text = Text(codec, stop)
    sys.stdout.write(shown(prompt))
    for token in tokens:
        sys.stdout.write(shown(text.add(token.item())))
        sys.stdout.flush()
        if text.ended:
            break
    sys.stdout.write(shown(text.end()) + "\n")
    return text.count


def encode(model, codec, prompt, where):
    """The ids of a prompt; `where` it is from, to name in errors."""
    try:
        ids = codec.encode(prompt)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if not ids:
        what, _, path = where.partition(":")
        raise ConfigError(f"{what.partition('=')[0]} is empty: write at least one token{path and f' into {path}'}")
    if max(ids) >= model.config.vocab_size:
        raise ConfigError(f"{where}: token {max(ids)} is beyond the model's vocabulary of {model.config.vocab_size}")
    return ids


class CompiledStep:
    """A model's step of one token, compiled. Layers' states are copied once into tensors that stay where they are, as a
    CUDA graph needs: so of each number of sequences it decodes one batch at a time. Prompts stay eager: each length
    would be compiled anew."""

    def __init__(self, model):
        self.model, self.eager, device = model, model.step, next(model.parameters()).device
        self.own, self.latest = {}, {}  # by number of sequences: the layers' states, and the state that came back last
        self.position = torch.zeros((), dtype=torch.long, device=device)
        torch._dynamo.mark_static_address(self.position)
        options = {"cpu": CPU_OPTIONS, "cuda": CUDA_OPTIONS}.get(device.type)
        self.decode = torch.compile(self._decode, options=options)

    def _decode(self, x, position, layers):
        """x (B, 1, C) -> logits (B, 1, V), and new states into `layers`."""
        for block, own in zip(self.model.transformer.h, layers):
            x, new = block.step(x, at(position, own))
            copy_states(own, new)
        return self.model.lm_head(self.model.transformer.ln_f(x))

    def __call__(self, idx, state):
        B, t = idx.shape
        if t > 1:
            return self.eager(idx, DecodeState(state.pos, at(state.pos, state.layers)))
        if B not in self.own:
            self.own[B] = tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, state.layers)
            for x in filter(torch.is_tensor, tree_leaves(self.own[B])):
                torch._dynamo.mark_static_address(x)
        elif state.layers is not self.own[B]:
            copy_states(self.own[B], state.layers)
        elif state is not self.latest[B]:
            raise ModelError("a compiled step decodes one batch at a time, and another one has taken this one's place")
        self.position.fill_(state.pos)
        self.latest[B] = DecodeState(state.pos + 1, self.own[B])
        return self.decode(self.model.embed(idx, state.pos), self.position, self.own[B]).clone(), self.latest[B]


def at(position, layers):
    """States whose numbers, which count the tokens so far, are `position`."""
    return tree_map(lambda x: position if isinstance(x, int) else x, layers)


def copy_states(into, new):
    for old, value in zip(tree_leaves(into), tree_leaves(new)):
        if torch.is_tensor(old):
            old.copy_(value)


def compile_step(model, batch):
    """Let the model decode single tokens of `batch` sequences by a compiled step. Returns the seconds that it took, or
    why the model stays eager."""
    growing = [name for name, block in zip(model.config.types(), model.transformer.h) if block.attn.keeps_keys]
    if growing:
        return f"eager: the state of {growing[0]} grows with the text"
    start, step = time.perf_counter(), CompiledStep(model)
    try:
        with torch.inference_mode():
            token = torch.zeros(batch, 1, dtype=torch.long, device=step.position.device)
            state = step.eager(token, model.init_state(batch))[1]
            for name, layer in zip(model.config.types(), state.layers):
                if any(not torch.is_tensor(x) and x not in (None, 1) for x in tree_leaves(layer)):
                    return f"eager: the state of {name} holds more than tensors and the number of tokens"
            for _ in range(3):  # a CUDA graph is warmed up, recorded and replayed
                state = step(token, state)[1]
    except Exception as error:  # the compiler or its C++ compiler
        torch._dynamo.reset()
        return f"eager: torch.compile failed ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
    model.step = step
    return f"step compiled in {time.perf_counter() - start:.1f} s"


def draw(cfg, model, prompts, codec, runtime):
    """Yield the next tokens (rows, 1) of a batch that holds num_samples rows for each of `prompts`, lists of ids. It
    begins behind the shortest: a longer prompt goes on with its own tokens until they end. Each prompt draws from a
    generator of its own, so that its text is the one that it has alone."""
    n, device, lengths = cfg.num_samples, torch.device(runtime.device), [len(ids) for ids in prompts]
    if cfg.compile and cfg.use_cache and "step" not in vars(model):
        print(compile_step(model, n * len(prompts)), file=sys.stderr)
    random = {"cuda": torch.cuda, "mps": torch.mps}.get(device.type, torch)
    at = (device,) if device.type == "cuda" else ()
    torch.manual_seed(cfg.seed)
    generators = [random.get_rng_state(*at)] * len(prompts)
    idx = torch.tensor([ids[: min(lengths)] for ids in prompts], device=device).repeat_interleave(n, 0)
    state = model.init_state(len(idx)) if cfg.use_cache else None
    for t in range(min(lengths), max(lengths) + cfg.max_new_tokens):
        logits, state = model._next_logits(idx, state)
        tokens = []
        for i, own in enumerate(logits[:, : codec.vocab_size].float().split(n)):
            if t < lengths[i]:
                tokens.append(idx.new_full((n, 1), prompts[i][t]))
                continue
            random.set_rng_state(generators[i], *at)
            tokens.append(sample_token(own, cfg.temperature, cfg.top_k, cfg.top_p))
            generators[i] = random.get_rng_state(*at)
        idx = torch.cat((idx, torch.cat(tokens)), 1)
        yield idx[:, -1:]


def batches(cfg, lengths):
    """Lists of the numbers of the prompts that share a batch. Prompts that are longer by more tokens than there are to
    draw cost less in a batch of their own."""
    groups = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        full = not groups or (len(groups[-1]) + 1) * cfg.num_samples > LARGEST
        if full or lengths[i] - lengths[groups[-1][-1]] > cfg.max_new_tokens:
            groups.append([])
        groups[-1].append(i)
    return groups


def continuations(cfg, model, codec, prompts, runtime):
    """Yield, for each of `prompts` (lists of ids) in order, its number and the Texts of its samples."""
    lengths, n, texts, following = [len(ids) for ids in prompts], cfg.num_samples, {}, 0
    for group in batches(cfg, lengths):
        rows = [Text(codec, cfg.stop, cfg.max_new_tokens) for i in group for _ in range(n)]
        texts |= {i: rows[k * n : (k + 1) * n] for k, i in enumerate(group)}
        for t, tokens in enumerate(draw(cfg, model, [prompts[i] for i in group], codec, runtime), lengths[group[0]]):
            for row, token in enumerate(tokens[:, 0].tolist()):
                if t >= lengths[group[row // n]] and not rows[row].ended:
                    rows[row].add(token)
            if all(text.ended for text in rows):
                break
        while following in texts:
            yield following, texts.pop(following)
            following += 1


def compare(cfg, runtime):
    """The continuations of each prompt by each model, in columns on the terminal, and as Markdown tables in cfg.out."""
    names = [name.strip() for name in cfg.compare.split(",") if name.strip()]
    if not names:
        raise ConfigError("--compare names no folder: write --compare=FOLDER,FOLDER")
    prompts = read_prompts(cfg.start, by_line=True)
    columns = []
    for name in names:
        hugging_face = os.path.exists(os.path.join(name, "config.json")) and not is_training_folder(name)
        from_hub = name.startswith("gpt2") and not os.path.isdir(name)
        model, meta = load_gpt2(name) if from_hub or hugging_face else load(cfg, name)
        if meta.get("labels"):
            raise ConfigError(f"--compare continues prompts, and {name} labels them: write --out_dir={name}")
        codec = get_codec(meta)
        model.to(runtime.device).eval()
        ids = [encode(model, codec, *prompt) for prompt in prompts]
        columns += [[text.said for text in texts] for _, texts in continuations(cfg, model, codec, ids, runtime)]
    width = max(20, (shutil.get_terminal_size().columns - 3 * (len(names) - 1)) // len(names))
    markdown = []
    for i, (prompt, _) in enumerate(prompts):
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


def respond(cfg, model, meta, codec, prompts, runtime):
    """Print what the model says to each of `prompts`: how they go on, or their labels."""
    if meta.get("stripped"):
        prompts = [(text.strip(), where) for text, where in prompts]
    ids = [encode(model, codec, *prompt) for prompt in prompts]
    lines = [where.partition("=LINES:")[2] for _, where in prompts]
    names = [f"=== {printable(line)} ===\n" if line else "" for line in lines]
    if meta.get("labels"):
        for name, own in zip(names, ids):
            answer = label_probabilities(model, own, meta["record_len"], meta["labels"], runtime)
            answer = {printable(label): p for label, p in answer.items()}
            print(name + next(iter(answer)) + "\n" + "\n".join(f"  {label:16} {p:.4f}" for label, p in answer.items()))
        return
    heads = [codec.decode_bytes(own).decode("utf-8", errors="replace") for own in ids]
    start, count = time.perf_counter(), 0
    if len(ids) == cfg.num_samples == 1:
        count = print_stream(names[0] + heads[0], draw(cfg, model, ids, codec, runtime), codec, cfg.stop)
    else:
        for i, texts in continuations(cfg, model, codec, ids, runtime):
            ends = "\n" + "-" * 80 if len(texts) > 1 else ""
            print(names[i] + "\n".join(shown(heads[i] + text.said) + ends for text in texts))
            count += sum(text.count for text in texts)
    if sys.stdout.isatty():
        seconds = time.perf_counter() - start
        print(f"{count} tokens in {seconds:.1f} s, {count / seconds:,.0f} tokens/s", file=sys.stderr)


def interact(cfg, model, meta, codec, runtime):
    """Ask for prompts until an empty line or Ctrl-D; Ctrl-C ends a sample."""
    for number in itertools.count():
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            text = ""
        if not text:
            return
        try:
            seed = (cfg.seed + number) % 2**31
            respond(replace(cfg, seed=seed), model, meta, codec, [(text, "the prompt")], runtime)
        except KeyboardInterrupt:
            print()
        except (ConfigError, DataError, ModelError) as error:
            print(f"sample.py: {printable(str(error))}", file=sys.stderr)


def main(argv):
    cfg, given = config.load(argv, SampleConfig)
    if cfg.interactive and (cfg.compare or "start" in given):
        raise ConfigError("--interactive asks for the prompts: leave out --start and --compare")
    runtime = config.resolve_device(cfg.device, cfg.dtype)
    for stream in (sys.stdin, sys.stdout):  # a terminal that lacks a character shows another; of input each byte stays
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "replace")
    with torch.no_grad(), runtime.autocast():
        if cfg.compare:
            compare(cfg, runtime)
            return 0
        model, meta = load(cfg, cfg.out_dir) if cfg.init_from == "checkpoint" else load_gpt2(cfg.init_from)
        codec = get_codec(meta)
        model.to(runtime.device).eval()
        if cfg.interactive:
            interact(cfg, model, meta, codec, runtime)
        else:
            respond(cfg, model, meta, codec, read_prompts(cfg.start), runtime)
    return 0


if __name__ == "__main__":
    config.run(main, DataError, ModelError)
