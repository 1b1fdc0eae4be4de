"""python -m benchmarks.revisions: is decoding faster than with another checkout of this repository?

    git worktree add ../before 6059c3a
    python -m benchmarks.revisions --beside=../before --types=gla,gsa,performer,spans --rounds=21

Each checkout decodes in a process of its own, on one thread, and each round asks all of them: one sequence, 4 layers of
4 heads, 256 wide. `compiled` is sample.py's compiled step. A ratio is of speeds within a round: the median over rounds,
and the quartiles. `spans` is adaptive_span with four different spans. gla/none decodes gla there and none here: it says
how much faster a token would be if attention cost nothing.
"""

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SPANS = (32, 100, 250, 700)  # tokens, of 1,024
WITHOUT_POSITIONS = ("gla", "gsa", "performer", "deltanet", "gdn", "kda", "mamba2")


def worker(checkout, mode):
    """Reads types from standard input, one a line, and answers with the seconds of a text, or why there are none."""
    sys.path[0] = checkout  # this file may be newer than the checkout
    import torch

    from model import GPT, GPTConfig

    torch.set_num_threads(1)
    models = {}

    def make(kind):
        keys = dict(attention_type=kind, n_layer=4, n_head=4, n_embd=256, block_size=1024, vocab_size=256, bias=False)
        keys["pos_emb"] = "none" if kind in WITHOUT_POSITIONS else "rope"
        if kind == "spans":
            keys |= dict(attention_type="adaptive_span", span_param="ratio")
        model = GPT(GPTConfig(**keys)).eval()
        for block in model.transformer.h if kind == "spans" else ():
            block.attn.span.data = torch.tensor(SPANS) / 1024
        if mode == "compiled":
            import sample

            said = sample.compile_step(model, 1)
            if "compiled in" not in said:
                raise ValueError(said)
        return model

    @torch.inference_mode()
    def decode(model, tokens):
        logits, state = model.step(torch.zeros(1, 12, dtype=torch.long), model.init_state(1))
        start = time.perf_counter()
        for _ in range(tokens):
            logits, state = model.step(logits[:, -1:].argmax(-1), state)
        return time.perf_counter() - start

    for line in sys.stdin:
        kind, tokens = line.split()
        try:
            if kind not in models:
                models[kind] = make(kind)
                decode(models[kind], 20)
            print(f"seconds {decode(models[kind], int(tokens))}", flush=True)
        except Exception as error:
            print(f"none {' '.join(str(error).split())}", flush=True)


def ask(process, kind, tokens):
    """Seconds, or a reason that there are none."""
    process.stdin.write(f"{kind} {tokens}\n")
    process.stdin.flush()
    for line in process.stdout:
        word, _, rest = line.strip().partition(" ")
        if word in ("seconds", "none"):
            return float(rest) if word == "seconds" else rest
    raise RuntimeError(f"the process of a checkout ended: {process.args}")


def main(argv):
    import config
    from benchmarks.tables import Table
    from config import ConfigError, key

    @dataclass
    class RevisionsConfig:
        """Two checkouts"""

        beside: str = key("", "folder of the other checkout")
        types: str = key(
            "gla,gsa,performer", "attention types, and spans, comma-separated; there/here where they differ"
        )
        rounds: int = key(21, "rounds", low=2)
        tokens: int = key(200, "tokens of a text", low=1)

    cfg, _ = config.load(argv, RevisionsConfig)
    if not os.path.isfile(os.path.join(cfg.beside, "model.py")):
        raise ConfigError(f"--beside={cfg.beside}: no checkout, it holds no model.py")
    sides = {"beside": (os.path.abspath(cfg.beside), "eager"), "eager": (ROOT, "eager"), "compiled": (ROOT, "compiled")}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    started = {
        name: subprocess.Popen([sys.executable, __file__, "worker", *side], cwd=side[0], **pipes)
        for name, side in sides.items()
    }
    columns = {"attention": "", "code": "", "decoding (tokens/s)": ",.0f", "speed / beside": ""}
    with Table("revisions", f"{cfg.tokens} tokens, {cfg.rounds} rounds, beside {cfg.beside}", columns, keys=2) as table:
        for kind in cfg.types.split(","):
            theirs, _, ours = kind.partition("/")
            kinds = {name: theirs if name == "beside" else ours or theirs for name in sides}
            first = {name: ask(process, kinds[name], cfg.tokens) for name, process in started.items()}
            there = [name for name, found in first.items() if isinstance(found, float)]
            rounds = [{name: ask(started[name], kinds[name], cfg.tokens) for name in there} for _ in range(cfg.rounds)]
            for name in there:
                ratio = "-"
                if name != "beside" and "beside" in there:
                    low, middle, high = statistics.quantiles([r["beside"] / r[name] for r in rounds], n=4)
                    ratio = f"{middle:.2f} ({low:.2f} - {high:.2f})"
                table.add(kind, name, cfg.tokens / statistics.median(r[name] for r in rounds), ratio)
            for name in first.keys() - set(there):
                table.add(kind, name, None, first[name])
    for process in started.values():
        process.stdin.close()
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[2:])
    else:
        import config

        config.run(main)
