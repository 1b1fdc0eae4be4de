"""Folders of transformers and of flash-linear-attention: written with --export=hf, and read by GPT.from_pretrained."""

import json
import os

import pytest
import torch
from conftest import oracle

import config
import data
import formats
import train
from model import GPT, GPTConfig

LLAMA = dict(pos_emb="rope", norm="rmsnorm", mlp="swiglu")


def random_model(**keys):
    """A model whose every tensor is far from its first value: biases and norms too."""
    sizes = dict(block_size=32, vocab_size=256, n_layer=2, n_head=4, n_embd=32)
    model = GPT(GPTConfig(**sizes | keys)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def exported(model, tmp_path, codec=None):
    """The folder that --export=hf writes."""
    formats.export("hf", model, str(tmp_path), codec or data.BytesCodec())
    return str(tmp_path / "hf")


@pytest.mark.parametrize(
    "keys",
    [
        dict(),
        dict(bias=True, gelu="tanh", mlp_hidden=40, embedding="untied"),
        dict(qkv_bias=True, rope_base=500.0),
        LLAMA,
        LLAMA | dict(n_kv_head=2, head_dim=10, rope_base=500.0, mlp_hidden=24, embedding="untied"),
    ],
    ids=["gpt2", "gpt2-bias-tanh-untied", "gpt2-qkv-bias", "llama", "llama-grouped-untied"],
)
def test_transformers_gives_our_logits(keys, tmp_path):
    transformers = oracle("transformers")
    model = random_model(**keys)
    hf, report = transformers.AutoModelForCausalLM.from_pretrained(exported(model, tmp_path), output_loading_info=True)
    assert type(hf).__name__ == ("LlamaForCausalLM" if "pos_emb" in keys else "GPT2LMHeadModel")
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    idx = torch.randint(256, (2, 32))
    torch.testing.assert_close(hf.eval()(idx).logits, model(idx, idx)[0], rtol=0, atol=1e-4)
    prompt = idx[:1, :8]
    text = hf.generate(prompt, max_new_tokens=20, do_sample=False)
    assert torch.equal(text, model.generate(prompt, 20, temperature=0))  # no id ends a text


def test_its_config_is_in_the_safetensors_file(tmp_path):
    from safetensors import safe_open

    folder = exported(random_model(**LLAMA), tmp_path)
    with (
        safe_open(os.path.join(folder, "model.safetensors"), "pt") as f,
        open(os.path.join(folder, "config.json")) as g,
    ):
        assert json.loads(f.metadata()["config"]) == json.load(g)


def test_an_export_of_gpt2_comes_back(tmp_path):
    oracle("transformers")
    model, idx = random_model(bias=True), torch.randint(256, (2, 32))
    back = GPT.from_pretrained(exported(model, tmp_path)).eval()
    torch.testing.assert_close(back(idx, idx)[0], model(idx, idx)[0], rtol=0, atol=1e-5)


TEXT = "Bytes of text, é and 語,\n\n\tand   spaces. Don't! 1234 <|endoftext|>"


def test_the_tokenizer_of_bytes(tmp_path):
    transformers = oracle("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported(random_model(), tmp_path))
    for raw in (TEXT, "".join(map(chr, range(256)))):
        ids = tokenizer(raw)["input_ids"]
        assert ids == data.BytesCodec().encode(raw) and tokenizer.decode(ids) == raw
    assert tokenizer.model_max_length == 32


def test_the_tokenizer_of_gpt2(tmp_path, monkeypatch):
    """GPT-2's vocabulary needs a network: a smaller one of the same kind, learned here, is in its place."""
    transformers, tokenizers = oracle("transformers"), oracle("tokenizers")
    import tiktoken

    learned = tokenizers.Tokenizer(tokenizers.models.BPE())
    learned.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    learned.train_from_iterator([open(train.__file__, encoding="utf-8").read()], trainer)
    of_letter = {letter: b for b, letter in enumerate(formats.byte_letters())}
    ranks = {bytes(of_letter[letter] for letter in token): i for token, i in learned.get_vocab().items()}
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    special = {"<|endoftext|>": len(ranks)}
    bpe = tiktoken.Encoding("learned", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(data.GPT2Codec, "_bpe", bpe)
    monkeypatch.setattr(data.GPT2Codec, "vocab_size", len(ranks) + 1)
    codec = data.GPT2Codec()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported(random_model(vocab_size=640), tmp_path, codec))
    text = open(data.__file__, encoding="utf-8").read() + TEXT.removesuffix("<|endoftext|>")
    ids = tokenizer(text)["input_ids"]
    assert ids == codec.encode(text) and tokenizer.decode(ids) == text and len(ids) < len(text) / 2
    assert tokenizer("a<|endoftext|>")["input_ids"][-1] == tokenizer.eos_token_id == len(ranks)


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(attention_type="softmax,none"), "attention_type=softmax,none"),
        (dict(attention_type="performer"), "attention_type=performer"),
        (dict(norm="rmsnorm"), "norm=rmsnorm.*layernorm"),
        (dict(mlp="swiglu"), "mlp=swiglu.*gelu"),
        (dict(window=8), "window=8"),
        (dict(n_kv_head=2), "n_kv_head=2"),
        (dict(qk_norm=True), "qk_norm=True"),
        (dict(gate_output=True), "gate_output=True"),
        (dict(pos_emb="none"), "pos_emb=none.*rope"),
        (dict(embedding="onehot", n_embd=256), "embedding=onehot.*untied"),
        (LLAMA | dict(bias=True), "bias=True"),
        (LLAMA | dict(norm="layernorm"), "norm=layernorm"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(keys, message):
    with pytest.raises(config.ConfigError, match=f"export=hf: .*{message}") as error:
        formats.check_export("hf", random_model(**keys), data.BytesCodec())
    assert "\n" not in str(error.value)


def test_a_run_writes_it(tiny, tmp_path, capsys):
    """At its end, and from a run that has ended; what does not fit ends a run before it begins."""
    transformers = oracle("transformers")
    with pytest.raises(config.ConfigError, match="attention_type=nsa"):
        train.main(tiny(export="hf", attention_type="nsa"))
    assert not os.path.exists(tmp_path / "run" / "ckpt.pt")
    train.main(tiny(export="hf", max_iters=1, **LLAMA))
    hf = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "run" / "hf")).eval()
    ours, idx = GPT.from_checkpoint(str(tmp_path / "run"), "ckpt.pt").eval(), torch.randint(256, (1, 16))
    torch.testing.assert_close(hf(idx).logits, ours(idx, idx)[0], rtol=0, atol=1e-4)
    before = os.path.getmtime(tmp_path / "run" / "hf")
    train.main(tiny(export="hf", max_iters=1, init_from="resume", eval_only=True))
    assert os.path.getmtime(tmp_path / "run" / "hf") > before
    train.main(tiny(max_iters=1))  # another run: the folder goes with the earlier one
    assert sorted(os.listdir(tmp_path / "run" / "previous" / "hf"))[0] == "config.json"
    assert not os.path.exists(tmp_path / "run" / "hf")


def test_symbols_have_no_tokenizer(tiny, labelled_dataset):
    with pytest.raises(config.ConfigError, match="symbols"):
        train.main(tiny(export="hf", dataset=labelled_dataset))
