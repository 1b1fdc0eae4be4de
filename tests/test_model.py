"""The GPT around the attention: reference logits, foreign checkpoints, decoding, sizes."""

import math
import os

import pytest
import torch
from conftest import oracle
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import model as model_module
from model import ATTENTION, GPT, GPTConfig, ModelError, NoAttention, load_weights, param_groups, sample_token

TINY = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)


def make(**keys):
    """A tiny model in eval mode with weights that matter."""
    gpt = GPT(GPTConfig(**(TINY | keys))).eval()
    for p in gpt.parameters():
        if p.dim() >= 2:
            torch.nn.init.normal_(p, std=0.3)
    return gpt


def nanogpt_logits(w, idx, n_layer, n_head):
    """The forward pass of the GPT that nanoGPT's tensors describe, written out."""
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w.get(name + ".bias"))  # noqa: E731
    linear = lambda x, name: F.linear(x, w[name + ".weight"], w.get(name + ".bias"))  # noqa: E731
    B, T = idx.shape
    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][:T]
    for i in range(n_layer):
        h = f"transformer.h.{i}."
        q, k, v = linear(norm(x, h + "ln_1"), h + "attn.c_attn").chunk(3, -1)
        heads = [t.view(B, T, n_head, -1).transpose(1, 2) for t in (q, k, v)]
        logits = heads[0] @ heads[1].mT / math.sqrt(heads[0].size(-1)) + torch.full((T, T), -math.inf).triu(1)
        x = x + linear((logits.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2), h + "attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, h + "ln_2"), h + "mlp.c_fc")), h + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_checkpoint_loads(tmp_path, prefix, bias):
    donor = make(bias=bias, dropout=0.1)
    for p in donor.parameters():
        torch.nn.init.normal_(p, std=0.2)
    weights = donor.state_dict()
    stored = {prefix + k: v for k, v in weights.items()}
    stored |= {f"{prefix}transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}  # no flash
    args = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=bias, vocab_size=50, dropout=0.1)
    checkpoint = dict(
        model=stored, model_args=args, optimizer={}, iter_num=7, best_val_loss=torch.tensor(1.5), config={}
    )
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    loaded = GPT.from_checkpoint(str(tmp_path)).eval()
    assert loaded.loaded.new == [] and loaded.loaded.left == [f"transformer.h.{i}.attn.bias" for i in range(2)]
    idx = torch.randint(50, (3, 16))
    logits = loaded(idx, idx)[0]
    torch.testing.assert_close(logits, nanogpt_logits(weights, idx, 2, 2), rtol=0, atol=1e-5)


STORED = os.path.join(
    os.path.dirname(os.path.abspath(__file__)), "checkpoints"
)  # a folder for each type, and logits.pt


@pytest.mark.parametrize("name, file", [*((name, "ckpt.pt") for name in ATTENTION), ("gla", "model.safetensors")])
def test_stored_checkpoints_load(name, file):
    """Checkpoints and an export that commit 6059c3a wrote give the logits that it gave."""
    logits = torch.load(os.path.join(STORED, "logits.pt"))
    if name not in logits:
        pytest.skip("a type that is younger than the stored checkpoints")
    gpt, idx = GPT.from_checkpoint(os.path.join(STORED, name), file).eval(), torch.arange(16)[None] * 7 % 32
    assert gpt.config.attention_type == name and not gpt.loaded.new and not gpt.loaded.left
    torch.testing.assert_close(gpt(idx, idx)[0], logits[name], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """A small random GPT-2 that transformers saved, with weights large enough that a wrong GELU would show."""
    transformers = oracle("transformers")
    shape = dict(
        vocab_size=97, n_positions=32, n_embd=48, n_layer=3, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    torch.manual_seed(1)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    for p in hf.parameters():
        p.data.normal_(0, 0.3)
    folder = str(tmp_path_factory.mktemp("gpt2"))
    hf.save_pretrained(folder)
    return folder, hf


def test_gpt2_logits(gpt2_folder):
    folder, hf = gpt2_folder
    gpt = GPT.from_pretrained(folder).eval()
    assert gpt.loaded.new == [] and gpt.loaded.left == []
    idx = torch.randint(97, (2, 32))
    expected = hf(idx).logits
    torch.testing.assert_close(gpt(idx, idx)[0], expected, rtol=0, atol=3e-5)
    assert (GPT.from_pretrained(folder, gelu="erf").eval()(idx, idx)[0] - expected).abs().max() > 2e-4


def test_gpt2_with_another_attention_keeps_what_fits(gpt2_folder):
    folder, _ = gpt2_folder
    gpt = GPT.from_pretrained(folder, attention_type="none,softmax", block_size=20)
    names = [f"transformer.h.{i}.{n}" for i in (0, 2) for n in ("attn.c_attn", "attn.c_proj", "ln_1")]
    assert set(gpt.loaded.left) == {f"{n}.{p}" for n in names for p in ("weight", "bias")}
    assert gpt.loaded.new == []
    whole = GPT.from_pretrained(folder)
    for name in ("transformer.wte.weight", "transformer.h.1.attn.c_attn.weight", "transformer.h.0.mlp.c_fc.weight"):
        assert torch.equal(gpt.state_dict()[name], whole.state_dict()[name])
    assert torch.equal(gpt.transformer.wpe.weight, whole.transformer.wpe.weight[:20])


def test_missing_gpt2_is_one_line(tmp_path):
    oracle("transformers")
    with pytest.raises(ModelError) as error:
        GPT.from_pretrained(str(tmp_path))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("keys, want", [
    (dict(top_p=0.0), "top_p=0.0: write a number above 0"), (dict(top_k=0), "top_k=0: write at least 1"),
    (dict(temperature=-1.0), "temperature=-1.0"), (dict(idx=torch.zeros(1, 0, dtype=torch.long)), "an empty prompt"),
])  # fmt: skip
def test_sampling_that_means_nothing_is_one_line(keys, want):
    with pytest.raises(ModelError) as error:
        make().generate(**(dict(idx=torch.zeros(1, 3, dtype=torch.long), max_new_tokens=1) | keys))
    assert str(error.value).startswith(want) and "\n" not in str(error.value)


@pytest.mark.parametrize("keys, want", [
    (dict(attention_type="gla", gla_expand_k=0.01), "gla_expand_k=0.01 of n_embd=32: write at least 0.03125"),
    (dict(attention_type="gla", gla_expand_v=0.01), "gla_expand_v=0.01"),
    (dict(gla_expand_k=1.0), "gla_expand_k belongs to attention_type=gla, and no layer of 'softmax' is one"),
    (dict(attention_type="gla,none", gate_output=True), "gate_output belongs to attention_type=softmax|"),
])  # fmt: skip
def test_keys_that_mean_nothing_are_refused(keys, want):
    with pytest.raises(ValueError) as error:
        GPTConfig(**(dict(n_head=2, n_embd=32, vocab_size=50) | keys))
    assert str(error.value).startswith(want)


def test_keys_of_the_type_before_go_back_to_their_defaults(tmp_path):
    gpt = make(attention_type="gla", gla_expand_k=1.0)
    torch.save(dict(model=gpt.state_dict(), model_args=vars(gpt.config)), tmp_path / "ckpt.pt")
    assert GPT.from_checkpoint(str(tmp_path)).config == gpt.config
    assert GPT.from_checkpoint(str(tmp_path), attention_type="softmax").config.gla_expand_k == 0.5


def test_what_is_new_is_listed():
    report = load_weights(make(), (other := make(attention_type="none")).state_dict(), other.config)
    assert (
        report.left == [] and all(".attn." in name or ".ln_1." in name for name in report.new) and len(report.new) == 6
    )
    wrong = load_weights(make(), (other := make(n_embd=16)).state_dict(), other.config)
    assert wrong.copied == [] and "transformer.wte.weight" in wrong.left and "transformer.wte.weight" in wrong.new


@pytest.mark.parametrize("keys", [
    dict(mlp="swiglu", norm="rmsnorm", pos_emb="rope", embedding="untied"),
    dict(mlp="none", norm="none", pos_emb="none", embedding="onehot", n_embd=50, head_dim=1, bias=True),
    dict(attention_type="none,softmax,softmax", n_layer=4, head_dim=24),
])  # fmt: skip
def test_forms_train_and_decode(keys, fresh_rng):
    gpt = make(**keys).double()
    idx = torch.randint(50, (2, 16))
    logits, loss = gpt(idx, idx)
    assert logits.shape == (2, 16, 50) and loss.shape == ()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gpt.parameters())
    state, found = gpt.init_state(2), []
    for part in idx.split([5, 1, 1, 9], 1):
        out, state = gpt.step(part, state)
        found.append(out)
    torch.testing.assert_close(torch.cat(found, 1), logits, rtol=0, atol=1e-9)
    last, none = gpt(idx)
    assert none is None
    torch.testing.assert_close(last[:, 0], logits[:, -1], rtol=0, atol=1e-12)


def test_onehot_model_is_the_identity_without_attention():
    gpt = make(mlp="none", norm="none", pos_emb="none", embedding="onehot", n_embd=50, attention_type="none")
    idx = torch.randint(50, (2, 16))
    assert torch.equal(gpt(idx, idx)[0], F.one_hot(idx, 50).float()) and gpt.num_params() == 0


@pytest.mark.parametrize("keys, key_named", [
    (dict(attention_type="sofmax"), "attention_type"), (dict(n_head=3), "n_head"),
    (dict(pos_emb="rope", head_dim=3), "rope"), (dict(embedding="onehot"), "onehot"),
])  # fmt: skip
def test_impossible_models_say_which_key(keys, key_named):
    with pytest.raises(ValueError, match=key_named):
        GPTConfig(**(TINY | keys))


def test_too_long_for_learned_positions():
    with pytest.raises(ModelError, match="block_size=16"):
        make()(torch.zeros(1, 17, dtype=torch.long))


# decoding


@pytest.mark.parametrize("pos_emb", ["learned", "rope", "none"])
@pytest.mark.parametrize("prompt", [1, 12, 16, 40])
def test_cached_text_is_the_recomputed_text(pos_emb, prompt, fresh_rng):
    gpt = make(pos_emb=pos_emb).double()
    idx = torch.randint(50, (2, prompt))
    cached = gpt.generate(idx, 60, temperature=0)
    assert cached.shape == (2, prompt + 60) and torch.equal(cached[:, :prompt], idx)
    assert torch.equal(cached, gpt.generate(idx, 60, temperature=0, use_cache=False))


def test_learned_block_restarts_from_its_last_half(fresh_rng):
    """At the end of a block of 16 the context is the last 8 tokens and the new one."""
    gpt = make().double()
    text = gpt.generate(torch.randint(50, (1, 3)), 40, temperature=0)
    for n in range(3, 43):
        start = 0 if n <= 16 else 8 * math.ceil((n - 16) / 8)
        assert gpt(text[:, start:n])[0].argmax(-1).item() == text[0, n].item()


def test_draws_follow_the_distribution_and_the_limits(fresh_rng):
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]]).repeat(20000, 1)

    def share(**keys):
        draws = sample_token(logits, **(dict(temperature=1.0, top_k=None, top_p=None) | keys))
        return draws.flatten().bincount(minlength=5) / 20000

    p = logits[0].softmax(-1)
    torch.testing.assert_close(share(), p, rtol=0, atol=0.02)
    torch.testing.assert_close(share(temperature=2.0), (logits[0] / 2).softmax(-1), rtol=0, atol=0.02)
    top2 = p[:2] / p[:2].sum()
    torch.testing.assert_close(share(top_k=2), F.pad(top2, (0, 3)), rtol=0, atol=0.02)
    torch.testing.assert_close(share(top_k=99), p, rtol=0, atol=0.02)
    assert p[0] < 0.7 < p[:2].sum()
    torch.testing.assert_close(share(top_p=0.7), F.pad(top2, (0, 3)), rtol=0, atol=0.02)
    torch.testing.assert_close(share(top_p=1.0), p, rtol=0, atol=0.02)
    assert share(top_p=1e-6)[0] == 1 and share(top_k=1)[0] == 1 and share(temperature=0)[0] == 1


def test_padding_ids_are_never_drawn(fresh_rng):
    gpt = make(embedding="untied")
    gpt.lm_head.weight.data[40:] = 0
    gpt.lm_head.weight.data[:40] = -gpt.lm_head.weight.data[:40].abs() * 0 - 1e-3  # padding is as likely as the rest
    free = gpt.generate(torch.zeros(8, 1, dtype=torch.long), 60)
    assert free[:, 1:].max() >= 40
    kept = gpt.generate(torch.zeros(8, 1, dtype=torch.long), 60, vocab_size=40)
    assert kept.max() < 40


# parameters and sizes


def test_every_parameter_is_in_one_group(monkeypatch):
    class Spanned(NoAttention):
        mask_parameters = ("span",)

        def __init__(self, config):
            super().__init__(config)
            self.span = torch.nn.Parameter(torch.zeros(2, 2))

    monkeypatch.setitem(model_module.ATTENTION, "spanned", Spanned)
    gpt = make(bias=True, attention_type="softmax,spanned")
    groups = param_groups(gpt)
    names = [name for members in groups.values() for name, _ in members]
    assert sorted(names) == sorted(name for name, _ in gpt.named_parameters())
    assert [name for name, _ in groups["mask"]] == ["transformer.h.1.attn.span"]
    assert all(p.dim() >= 2 for _, p in groups["matrix"]) and all(p.dim() == 1 for _, p in groups["vector"])


def test_sizes():
    gpt = GPT(GPTConfig(vocab_size=50257))  # GPT-2 small without biases
    assert gpt.num_params() == sum(p.numel() for p in gpt.parameters()) - 1024 * 768
    per_layer = 12 * 768**2 + 2 * 768
    assert gpt.num_params() == 50257 * 768 + 12 * per_layer + 768
    assert gpt.lm_head.weight is gpt.transformer.wte.weight
    assert gpt.transformer.h[3].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(24), rel=0.02)
    assert gpt.transformer.h[3].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu", "none"])
def test_matrix_operations_equal_a_count(mlp):
    gpt = make(attention_type="none", mlp=mlp)
    idx = torch.randint(50, (1, 16))
    with FlopCounterMode(display=False) as counter:
        gpt(idx, idx)
    assert gpt.flops(16) == (counter.get_total_flops(),) * 2
    pairs = 4 * 32 * (16 * 17 // 2)  # scores and values of one layer
    assert make(mlp=mlp).transformer.h[0].attn.flops(16) == (pairs, pairs)


def test_trace_gives_each_layers_attention(fresh_rng):
    gpt = make().double()
    idx = torch.randint(50, (2, 16))
    trace = gpt.trace(idx)
    assert len(trace) == 2
    for block, (x, y) in zip(gpt.transformer.h, trace):
        assert torch.equal(block.attn(x)[0], y) and x.shape == y.shape == (2, 16, 32)
    torch.testing.assert_close(trace[0][0], gpt.transformer.h[0].ln_1(gpt.embed(idx, 0)))


# files


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 truncated"])
def test_unreadable_checkpoints_are_one_line(tmp_path, content):
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(ModelError, match="ckpt.pt") as error:
        GPT.from_checkpoint(str(tmp_path))
    assert "\n" not in str(error.value)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"model": {}, "model_args": {}, "x": Evil()}, tmp_path / "ckpt.pt")
    with pytest.raises(ModelError, match="ckpt.pt"):
        GPT.from_checkpoint(str(tmp_path))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("stored, said", [
    ({"weights": {}}, "no model and model_args"), ({"model": {}, "model_args": {"n_layr": 3}}, "n_layr"),
    ({"model": {}, "model_args": {"n_head": 5, "n_embd": 32}}, "n_embd"),
])  # fmt: skip
def test_foreign_checkpoints_are_named(tmp_path, stored, said):
    torch.save(stored, tmp_path / "ckpt.pt")
    with pytest.raises(ModelError, match=said):
        GPT.from_checkpoint(str(tmp_path))


def test_missing_checkpoint(tmp_path):
    with pytest.raises(ModelError, match="train one"):
        GPT.from_checkpoint(str(tmp_path))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_damaged_weights_are_named(temperature):
    with pytest.raises(ModelError, match="not a number"):
        sample_token(torch.tensor([[0.0, float("nan")]]), temperature, None, None)
