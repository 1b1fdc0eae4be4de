"""Folders of transformers and of flash-linear-attention: written with --export=hf, and read by GPT.from_pretrained."""

import importlib
import json
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import oracle

import config
import data
import formats
import sample
import train
from model import GPT, GPTConfig
from weights import ModelError

LLAMA = dict(pos_emb="rope", norm="rmsnorm", mlp="swiglu")
LINEAR = dict(pos_emb="none", norm="rmsnorm", mlp="swiglu", embedding="untied")


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
    of_letter = {letter: b for b, letter in enumerate(data.byte_letters())}
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
        (dict(attention_type="gla"), "pos_emb=learned.*none or rope"),
        (LINEAR | dict(attention_type="gla", gla_gate="scalar"), "gla_gate=scalar"),
        (LINEAR | dict(attention_type="gla", gla_gate_rank=8), "gla_gate_rank=8.*16"),
        (LINEAR | dict(attention_type="gsa", gate_output=True), "gate_output=True"),
        (LINEAR | dict(attention_type="gdn", delta_beta_max=1.5), "delta_beta_max=1.5.*1.0 or 2.0"),
        (LINEAR | dict(attention_type="gdn,gla"), "attention_type=gdn,gla"),
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


# linear models of flash-linear-attention

CASES = {  # {case: our model's keys}
    "gla": dict(attention_type="gla", gla_n_head=2, gla_gate_min=None, mlp_hidden=40),
    "gla-bounded": dict(attention_type="gla", gla_n_head=4, gla_expand_k=1.0, gla_expand_v=0.5, embedding="tied"),
    "gsa": dict(attention_type="gsa", gsa_n_head=2, gsa_slots=6),
    "gsa-tied": dict(attention_type="gsa", gsa_slots=4, gsa_gate_normalizer=3.0, embedding="tied"),
    "deltanet": dict(attention_type="deltanet", delta_n_head=2),
    "deltanet-without-conv": dict(attention_type="deltanet", delta_n_head=4, delta_expand_v=2.0, delta_conv=0),
    "gdn": dict(attention_type="gdn", delta_n_head=2, delta_conv=3, delta_expand_v=0.5),
    "gdn-negative": dict(attention_type="gdn", delta_n_head=4, delta_beta_max=2.0, embedding="tied"),
}


def rms(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def mixer(kind, c, w, x):
    """A layer of flash-linear-attention, by its equations and the loops of fla-core; w holds its tensors by name."""
    silu, logsigmoid, B, T = F.silu, F.logsigmoid, *x.shape[:2]

    def heads(name):
        y = x @ w[f"{name}_proj.weight"].mT
        if f"{name}_conv1d.weight" in w:
            kernel = w[f"{name}_conv1d.weight"]
            y = F.conv1d(F.pad(y.mT, (kernel.shape[-1] - 1, 0)), kernel, groups=len(kernel)).mT
        return y.reshape(B, T, c["num_heads"], -1)

    q, k, v = (heads(name) for name in "qkv")
    if kind == "gla":
        g = (x @ w["gk_proj.0.weight"].mT @ w["gk_proj.1.weight"].mT + w["gk_proj.1.bias"]).view(k.shape)
        g = logsigmoid(g) / 16
        g = g if c["clamp_min"] is None else g.clamp(min=c["clamp_min"])
        o = oracle("fla.ops.gla.naive").naive_recurrent_gla(q, k, v, g)[0]
        o = (rms(o, w["g_norm_swish_gate.weight"], c["norm_eps"]) * silu(heads("g"))).flatten(2)
    elif kind == "gsa":
        f = logsigmoid(heads("f")) / c["gate_logit_normalizer"]
        loop = oracle("fla.ops.gsa.naive").naive_recurrent_gsa
        o = loop(silu(q), silu(k), silu(v), 1 - f.exp(), f, scale=1.0)[0]
        o = rms(silu(o.flatten(2)), w["g_norm.weight"], 1e-5)  # whatever norm_eps says
    else:
        q, k, v = silu(q), silu(k), silu(v)
        q, k = (t * (t.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k))
        beta = heads("b")[..., 0].sigmoid() * (2 if c["allow_neg_eigval"] else 1)
        g = torch.zeros_like(beta)
        if kind == "gated_deltanet":
            g = -w["A_log"].exp() * F.softplus(heads("a")[..., 0] + w["dt_bias"])
        loop = oracle("fla.ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule
        o = (rms(loop(q, k, v, beta, g)[0], w["o_norm.weight"], c["norm_eps"]) * silu(heads("g"))).flatten(2)
    return o @ w["o_proj.weight"].mT


def published_logits(folder, idx):
    """The logits of a checkpoint of flash-linear-attention, of its config.json and its tensors alone."""
    from safetensors.torch import load_file

    with open(os.path.join(folder, "config.json")) as f:
        c = json.load(f)
    w = load_file(os.path.join(folder, "model.safetensors"))
    x, eps = w["model.embeddings.weight"][idx], c["norm_eps"]
    for i in range(c["num_hidden_layers"]):
        of = f"model.layers.{i}."
        layer = {name.removeprefix(of): t for name, t in w.items() if name.startswith(of)}
        own = {name.removeprefix("attn."): t for name, t in layer.items()}
        x = x + mixer(c["model_type"], c, own, rms(x, layer["attn_norm.weight"], eps))
        y = rms(x, layer["mlp_norm.weight"], eps)
        y = F.silu(y @ layer["mlp.gate_proj.weight"].mT) * (y @ layer["mlp.up_proj.weight"].mT)
        x = x + y @ layer["mlp.down_proj.weight"].mT
    head = "model.embeddings.weight" if c["tie_word_embeddings"] else "lm_head.weight"
    return rms(x, w["model.norm.weight"], eps) @ w[head].mT


def change(folder, **options):
    """Other options in a folder's config.json; None takes one away."""
    path = os.path.join(folder, "config.json")
    with open(path) as f:
        changed = json.load(f) | options
    with open(path, "w") as f:
        json.dump({k: v for k, v in changed.items() if v != "absent"}, f)


@pytest.mark.parametrize("case", CASES)
def test_a_linear_model_leaves_and_comes_back(case, tmp_path):
    model, idx = random_model(**LINEAR | CASES[case]), torch.randint(256, (2, 40))
    folder, expected = exported(model, tmp_path), model(idx, idx)[0]
    difference = published_logits(folder, idx) - expected  # of logits up to 6, of which a few are far from the rest
    assert difference.norm() <= 2e-5 * expected.norm() and difference.abs().max() <= 3e-4
    back = GPT.from_pretrained(folder).eval()
    assert back.loaded.new == back.loaded.left == []
    torch.testing.assert_close(back(idx, idx)[0], expected, rtol=0, atol=1e-6)
    for name in ("attention_type", "block_size", "embedding", "delta_conv", "gla_gate_min", "gsa_gate_normalizer"):
        assert getattr(back.config, name) == getattr(model.config, name)


@pytest.mark.parametrize("case", ["gla", "gla-bounded", "gsa", "gsa-tied"])
def test_published_checkpoints_have_another_epsilon(case, tmp_path):
    """1e-6, and small activations, where it counts: the weights that are read are scaled to ours."""
    model, idx = random_model(**LINEAR | CASES[case]), torch.randint(256, (2, 40))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("wte.weight", "c_proj.weight")):
                p.mul_(0.01)
    folder, before = exported(model, tmp_path), model(idx, idx)[0]
    change(folder, norm_eps=1e-6)
    expected, ours = published_logits(folder, idx), GPT.from_pretrained(folder).eval()
    torch.testing.assert_close(ours(idx, idx)[0], expected, rtol=0, atol=1e-4)
    assert (before - expected).abs().max() > 1e-2


@pytest.mark.parametrize("case", [case for case in CASES if "without" not in case])
def test_flash_linear_attention_gives_our_logits(case, tmp_path, monkeypatch):
    """Its own layers and models, from the package that nothing here requires, without their Triton modules."""
    pytest.importorskip("fla.models", reason="flash-linear-attention is not installed: fla-core has no models")
    import fla.modules.mlp

    class Norm(torch.nn.Module):
        def __init__(self, hidden_size, elementwise_affine=True, eps=1e-5, **options):
            super().__init__()
            self.weight, self.bias, self.eps = torch.nn.Parameter(torch.ones(hidden_size)), None, eps

        def forward(self, x, residual=None, prenorm=False):
            x = x + residual if prenorm else x
            return (rms(x, self.weight, self.eps), x) if prenorm else rms(x, self.weight, self.eps)

    class Gated(Norm):
        def forward(self, x, gate):
            return super().forward(x) * F.silu(gate)

    class Convolution(torch.nn.Conv1d):
        def __init__(self, hidden_size, kernel_size, bias, activation):
            super().__init__(hidden_size, hidden_size, kernel_size, groups=hidden_size, bias=bias)

        def forward(self, x, **state):
            return F.silu(super().forward(F.pad(x.mT, (self.kernel_size[0] - 1, 0))).mT), None

    def gla(q, k, v, gk, **options):
        return oracle("fla.ops.gla.naive").naive_recurrent_gla(q, k, v, gk)

    def gsa(q, k, v, s, g, scale, **options):
        return oracle("fla.ops.gsa.naive").naive_recurrent_gsa(q, k, v, s, g, scale=scale)

    def gdn(q, k, v, beta, g=None, A_log=None, dt_bias=None, allow_neg_eigval=False, **options):
        q, k = (t * (t.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k))
        g = torch.zeros_like(beta) if g is None else -A_log.exp() * F.softplus(g + dt_bias)
        beta = beta if A_log is None else beta.sigmoid() * (2 if allow_neg_eigval else 1)
        return oracle("fla.ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule(q, k, v, beta, g)

    def norm_linear(x, weight, bias, linear, linear_bias, eps=1e-5):
        return F.linear(rms(x, weight, eps), linear)

    names = ("gla", "gsa", "delta_net", "gated_deltanet")
    places = [importlib.import_module(f"fla.layers.{name}") for name in names]
    places += [importlib.import_module(f"fla.models.{name}.modeling_{name}") for name in names] + [fla.modules.mlp]
    swaps = dict(FusedRMSNormGated=Gated, RMSNorm=Norm, ShortConvolution=Convolution, SwishFeatureMap=torch.nn.SiLU)
    swaps |= dict(fused_recurrent_gla=gla, fused_recurrent_gsa=gsa, rms_norm_linear=norm_linear)
    swaps |= dict(fused_recurrent_delta_rule=gdn, fused_recurrent_gated_delta_rule=gdn)
    swaps |= dict(swiglu=lambda gate, y: F.silu(gate) * y)
    for place in places:
        for name in swaps.keys() & vars(place).keys():
            monkeypatch.setattr(place, name, swaps[name])
    monkeypatch.setattr(places[3].GatedDeltaNet, "_use_fused_qkv_conv", lambda *a, **k: False)
    model, idx = random_model(**LINEAR | CASES[case]), torch.randint(256, (2, 40))
    folder = exported(model, tmp_path)
    change(folder, fuse_swiglu=False)
    auto = oracle("transformers").AutoModelForCausalLM
    hf, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        logits = hf.eval()(idx, use_cache=False).logits
    torch.testing.assert_close(logits, model(idx, idx)[0], rtol=0, atol=1e-4)
    back = GPT.from_pretrained(folder).eval()
    torch.testing.assert_close(back(idx, idx)[0], logits, rtol=0, atol=1e-4)


def test_mamba2_of_transformers_gives_our_logits(tmp_path):
    transformers = oracle("transformers")
    sizes = dict(hidden_size=32, num_heads=4, head_dim=16, state_size=8, num_hidden_layers=2, vocab_size=64, expand=2)
    options = dict(n_groups=1, use_conv_bias=False, initializer_range=0.3)
    hf = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes | options)).eval()
    hf.save_pretrained(tmp_path)
    ours, idx = GPT.from_pretrained(str(tmp_path)).eval(), torch.randint(64, (2, 40))
    assert ours.config.attention_type == "mamba2" and ours.loaded.new == ours.loaded.left == []
    with torch.no_grad():
        expected = hf(idx).logits
    torch.testing.assert_close(ours(idx, idx)[0], expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1
    for keys, message in ((dict(use_conv_bias=True), "use_conv_bias"), (dict(n_groups=2), "n_groups")):
        change(tmp_path, **keys)
        with pytest.raises(ModelError, match=f"its {message} is"):
            GPT.from_pretrained(str(tmp_path))
        change(tmp_path, **options)


def test_a_checkpoint_in_shards_of_bfloat16_is_read(tmp_path):
    """As the hub has them; with fuse_norm=False one tensor has another name."""
    from safetensors.torch import load_file, save_file

    model, idx = random_model(**LINEAR | CASES["gla"]), torch.randint(256, (2, 40))
    folder = exported(model, tmp_path)
    expected, whole = GPT.from_pretrained(folder).bfloat16().float().eval(), os.path.join(folder, "model.safetensors")
    tensors = {n.replace("g_norm_swish_gate", "g_norm"): w.bfloat16() for n, w in load_file(whole).items()}
    os.unlink(whole)
    names, where = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, os.path.join(folder, f"part-{i}.safetensors"))
        where |= dict.fromkeys(part, f"part-{i}.safetensors")
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as f:
        json.dump({"weight_map": where}, f)
    assert torch.equal(GPT.from_pretrained(folder).eval()(idx, idx)[0], expected(idx, idx)[0])


@pytest.mark.parametrize(
    "case, options, message",
    [
        ("gla", dict(feature_map="relu"), "its feature_map is relu, here it is None"),
        ("gla", dict(use_short_conv=True), "use_short_conv"),
        ("gla", dict(use_output_gate=False), "use_output_gate"),
        ("gla", dict(num_kv_heads=1), "num_kv_heads"),
        ("gla", dict(attn={"layers": [1], "num_heads": 2}), "attn"),
        ("gla", dict(hidden_act="powlu"), "hidden_act"),
        ("gla", dict(norm_eps=0), "config.json"),
        ("gla", dict(hidden_size="absent"), "lacks hidden_size"),
        ("gla", dict(intermediate_size=48), "mlp.c_fc.weight has the shape"),
        ("gla", dict(num_hidden_layers=3), "lacks model.layers.2.attn_norm.weight"),
        ("gla", dict(num_hidden_layers=1), "model.layers.1.attn.g_norm_swish_gate.weight has no place"),
        ("gla", dict(num_heads="2"), "num_heads='2'"),
        ("gla", dict(model_type=["gla"]), "gla"),
        ("gsa", dict(feature_map="t2r"), "feature_map"),
        ("gsa", dict(expand_v=2.0), "expand_v"),
        ("deltanet", dict(use_gate="absent"), "its use_gate is False"),
        ("deltanet", dict(norm_eps="absent"), "its norm_eps is 1e-06, here it is 1e-05"),
        ("deltanet", dict(qk_norm="sum"), "qk_norm"),
        ("gdn", dict(num_v_heads=4), "num_v_heads"),
        ("gdn", dict(head_dim=32), "head_dim=32"),
        ("gdn", dict(output_gate_activation="sigmoid"), "output_gate_activation"),
    ],
)
def test_what_ours_cannot_compute_is_refused_by_its_option(case, options, message, tmp_path):
    folder = exported(random_model(**LINEAR | CASES[case]), tmp_path)
    change(folder, **options)
    with pytest.raises((ModelError, config.ConfigError), match=message) as error:
        GPT.from_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_a_folder_without_weights_is_one_line(content, tmp_path):
    folder = exported(random_model(**LINEAR | CASES["gsa"]), tmp_path)
    path = os.path.join(folder, "model.safetensors")
    os.unlink(path)
    if content is not None:
        with open(path, "wb") as f:
            f.write(content)
    with pytest.raises(ModelError, match="no weights in") as error:
        GPT.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_a_folder_brings_its_tokenizer(tmp_path, capsys):
    """sample.py decodes a model of bytes with the tokenizer of its folder, not with GPT-2's."""
    oracle("tokenizers")
    folder = exported(random_model(), tmp_path)
    codec = data.get_codec({"codec": "tokenizer", "tokenizer": os.path.join(folder, "tokenizer.json")})
    text = "Grüße, \N{SNOWMAN} \n  and\tmore"
    assert codec.encode(text) == list(text.encode()) and codec.decode_bytes(range(256)) == bytes(range(256))
    keys = ["--start=ab", "--max_new_tokens=20", "--device=cpu", "--num_samples=1"]
    assert sample.main([f"--init_from={folder}", *keys]) == 0
    said = capsys.readouterr().out
    assert "ab" in said and "vocabulary" not in said
    os.remove(os.path.join(folder, "tokenizer.json"))
    with open(os.path.join(folder, "tokenizer.json"), "w") as f:
        f.write("{}")
    with pytest.raises(data.DataError, match="cannot read .*tokenizer.json by the package tokenizers"):
        sample.main([f"--init_from={folder}", *keys])


def test_pieces_with_a_mark_for_the_space(tmp_path):
    tokenizers = oracle("tokenizers")
    vocabulary = {"<s>": 0, "\u2581the": 1, "\u2581cat": 2, "s": 3, "<0x0A>": 4, "<0xE2>": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = data.TokenizerCodec(str(tmp_path / "tokenizer.json"))
    assert codec.vocab_size == 6 and codec.decode_bytes([0, 1, 2, 3, 4]) == b" the cats\n"
    assert codec.decode_bytes([5]) == b"\xe2"
    with pytest.raises(data.DataError, match="id 6 is outside"):
        codec.decode_bytes([6])
