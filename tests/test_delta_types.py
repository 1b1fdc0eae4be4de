"""The delta rule's types and Mamba-2, as layers: against their equations, written out again token by token."""

import math

import pytest
import torch
from test_attention import make
from torch.nn import functional as F

from model import ATTENTION, GPT, GPTConfig, load_weights, param_groups

DELTA = ("deltanet", "gdn", "kda")


def draw(name, **keys):
    """A layer in float64 whose vectors are not where they start, and an input (B, T, C)."""
    attn = make(name, block_size=160, **keys)
    for p in attn.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn_like(p)
    return attn, torch.randn(2, 83, 32, dtype=torch.float64, requires_grad=True)


def rows_of(attn, x):
    """{part: W_part x}, for one token x (C,)."""
    names, sizes = zip(*attn.parts.items())
    return {name: w @ x for name, w in zip(names, attn.c_attn.weight.split(sizes))}


def convolved(attn, tokens, width, names):
    """By token, {part: silu of the convolution}, one channel at a time."""
    found = []
    for t in range(len(tokens)):
        found.append({})
        first = 0
        for name in names:
            n = attn.parts[name]
            y = tokens[t][name]
            if width:
                w = attn.conv.view(width, -1)[:, first : first + n]
                y = sum(w[width - 1 - back] * tokens[t - back][name] for back in range(min(width, t + 1)))
            found[t][name] = y * torch.sigmoid(y)
            first += n
    return found


def rms(x, weight):
    return x / (x.square().mean() + 1e-5).sqrt() * weight


def delta_by_hand(attn, name, x, H, width, beta_max, gate_min):
    """One sequence x (T, C) -> (T, C). Each head's state is a list of its columns' answers: nothing in matrix form."""
    tokens = [rows_of(attn, token) for token in x]
    states, out = [None] * H, []
    for token, qkv in zip(tokens, convolved(attn, tokens, width, "qkv")):
        heads = []
        for h in range(H):
            q, k, v = (qkv[part].chunk(H)[h] for part in "qkv")
            q, k = q / q.norm(), k / k.norm()
            beta = beta_max / (1 + torch.exp(-token["b"][h]))
            S = torch.zeros(len(k), len(v), dtype=x.dtype) if states[h] is None else states[h]
            if name == "gdn":
                S = S * torch.exp(-attn.log_a[h].exp() * torch.log1p(torch.exp(token["a"][h] + attn.dt_bias[h])))
            if name == "kda":
                a = (attn.c_decay.weight @ token["a"] + attn.dt_bias).chunk(H)[h]
                g = -attn.log_a[h].exp() * torch.log1p(torch.exp(a))
                S = S * torch.exp(g.clamp(min=gate_min))[:, None]
            S = S + beta * torch.outer(k, v - S.T @ k)
            states[h] = S
            heads.append(rms(S.T @ q / math.sqrt(len(k)), attn.ln_o.weight))
        gate = token["r"] * torch.sigmoid(token["r"])
        if name == "kda":
            gate = torch.sigmoid(attn.c_gate.weight @ token["r"] + attn.c_gate.bias)
        out.append(attn.c_proj.weight @ (torch.cat(heads) * gate))
    return torch.stack(out)


@pytest.mark.parametrize("name", DELTA)
@pytest.mark.parametrize(
    "keys",
    [
        dict(delta_n_head=2),
        dict(delta_n_head=4, delta_expand_v=1.5, delta_beta_max=2.0),
        dict(delta_conv=0),
        dict(delta_conv=1),
        dict(delta_gate_min=-0.7),
    ],
)
def test_delta_layers_are_their_equations(name, keys, fresh_rng):
    """Outputs, and gradients of the input and of every parameter."""
    if name != "kda" and "delta_gate_min" in keys:
        pytest.skip("a key of kda")
    attn, x = draw(name, **keys)
    numbers = dict(width=keys.get("delta_conv", 4), beta_max=keys.get("delta_beta_max", 1.0))
    numbers |= dict(H=keys.get("delta_n_head", 1), gate_min=keys.get("delta_gate_min", -5.0))
    wanted = torch.stack([delta_by_hand(attn, name, sequence, **numbers) for sequence in x])
    compare(attn, x, wanted)


def compare(attn, x, wanted):
    y, _ = attn(x)
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
    weights, leaves = torch.randn_like(y), [x, *attn.parameters()]
    for found, right in zip(*(torch.autograd.grad((z * weights).sum(), leaves) for z in (y, wanted))):
        torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-8 * float(right.abs().max()))


@pytest.mark.parametrize(
    "keys",
    [
        dict(mamba2_n_head=2),
        dict(mamba2_n_head=4, mamba2_groups=2, mamba2_state=5, mamba2_expand=1.0),
        dict(mamba2_conv=0, mamba2_state=8),
        dict(mamba2_conv=2),
    ],
)
def test_mamba2_is_a_product_with_a_lower_triangle(keys, fresh_rng):
    """The dual form: y = (L * C B^T) (dt x), L_ij = exp of the decays of tokens after j up to i."""
    attn, x = draw("mamba2", **keys)
    H, G, width = keys.get("mamba2_n_head", 1), keys.get("mamba2_groups", 1), keys.get("mamba2_conv", 4)
    wanted = []
    for sequence in x:
        tokens = [rows_of(attn, token) for token in sequence]
        mixed = convolved(attn, tokens, width, "qkv")
        C, B, X = (torch.stack([token[part] for token in mixed]) for part in "qkv")
        dt = torch.log1p(torch.exp(torch.stack([token["a"] for token in tokens]) + attn.dt_bias))  # (T, H)
        logs = (-dt * attn.log_a.exp()).cumsum(0)
        heads = []
        for h in range(H):
            c, b = (z.chunk(G, 1)[h * G // H] for z in (C, B))
            v = X.chunk(H, 1)[h]
            L = (logs[:, None, h] - logs[None, :, h]).tril().exp().tril()
            heads.append((L * (c @ b.T)) @ (dt[:, h, None] * v) + attn.skip[h] * v)
        z = torch.stack([token["z"] for token in tokens])
        y = torch.cat(heads, 1) * z * torch.sigmoid(z)
        wanted.append(torch.stack([rms(row, attn.ln_o.weight) for row in y]) @ attn.c_proj.weight.T)
    compare(attn, x, torch.stack(wanted))


def test_a_beta_of_two_turns_a_state_around():
    """b_t = 2 reflects what the state answers to k_t; at most 1 never changes its sign."""
    for beta_max in (1.0, 2.0):
        attn = make("deltanet", delta_beta_max=beta_max, delta_conv=0)
        with torch.no_grad():
            rows = dict(zip(attn.parts, attn.c_attn.weight.split(list(attn.parts.values()))))
            rows["k"].zero_()
            rows["k"][0] = rows["b"][0] = 100.0  # one key for every token, and as large a b as there is
            rows["v"][:] = rows["v"].abs()
        x = torch.zeros(1, 2, 32, dtype=torch.float64)
        x[0, 0] = 1.0
        x[0, 1] = 1e-12 + F.one_hot(torch.tensor(0), 32)
        x[0, 1, 0] = 1.0
        with torch.no_grad():
            rows["v"][:, 0] = 0.0  # the second token brings nothing of its own
            (_, first), (_, second) = (attn.step(x[:, :t], attn.init_state(1, 8)) for t in (1, 2))
        answers = [S[0][0, 0, 0] for S in (first, second)]
        assert (answers[0] > 0).all()
        torch.testing.assert_close(answers[1], (1 - beta_max) * answers[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [*DELTA, "mamba2"])
def test_first_decays_are_the_published_ones(name):
    if name == "deltanet":
        assert not hasattr(make(name), "log_a")
        return
    torch.manual_seed(0)
    config = GPTConfig(n_layer=1, n_head=2, n_embd=2048, vocab_size=8, attention_type=name)
    attn = ATTENTION[name](config)
    A, dt = attn.log_a.exp(), F.softplus(attn.dt_bias)
    assert A.min() >= 1 and A.max() <= 16 and dt.min() > 0.00099 and dt.max() < 0.101
    if name == "kda":
        assert dt.log().mean().item() == pytest.approx(math.log(0.01), abs=0.1)  # log-uniform


@pytest.mark.parametrize("name", [*DELTA, "mamba2"])
def test_vectors_take_neither_decay_nor_muon(name):
    gpt = GPT(GPTConfig(block_size=8, n_layer=1, n_head=2, n_embd=32, vocab_size=8, attention_type=name))
    vectors = {n.rpartition(".")[2] for n, _ in param_groups(gpt)["vector"]}
    assert {"conv"} | ({"log_a", "dt_bias"} if name != "deltanet" else set()) <= vectors


@pytest.mark.parametrize("name", [*DELTA, "mamba2"])
def test_a_softmax_teachers_rows_are_copied_where_shapes_agree(name):
    keys = dict(block_size=8, n_layer=1, n_head=2, n_embd=32, vocab_size=8)
    teacher = GPT(GPTConfig(**keys))
    own = dict(mamba2_expand=1.0, mamba2_state=32) if name == "mamba2" else {}
    student = GPT(GPTConfig(**keys, attention_type=name, **own))
    report = load_weights(student, teacher.state_dict(), teacher.config)
    assert "transformer.h.0.attn.c_attn.weight[q,k,v]" in report.copied
    rows = student.transformer.h[0].attn.c_attn.weight[:96]
    assert torch.equal(rows, teacher.transformer.h[0].attn.c_attn.weight)
    other = dict(mamba2_state=7) if name == "mamba2" else dict(delta_expand_v=2.0)
    student = GPT(GPTConfig(**keys, attention_type=name, **other))
    report = load_weights(student, teacher.state_dict(), teacher.config)
    if name != "mamba2":  # of twice the width, its values are its own
        assert "transformer.h.0.attn.c_attn.weight[q,k]" in report.copied
    else:
        assert not any("c_attn" in copied for copied in report.copied)


@pytest.mark.parametrize("pattern", ["gdn,gdn,gdn,softmax", "kda,mamba2,softmax", "deltanet,gla"])
def test_hybrids_train_and_decode(pattern, fresh_rng):
    n = len(pattern.split(","))
    config = GPTConfig(block_size=32, n_layer=n, n_head=2, n_embd=32, vocab_size=11, attention_type=pattern)
    gpt = GPT(config)
    idx = torch.randint(11, (2, 32))
    gpt(idx, idx)[1].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gpt.parameters())
    gpt.double().eval()
    whole, state, found = gpt(idx, idx)[0], gpt.init_state(2), []
    for part in idx.split([5, 1, 20, 6], 1):
        logits, state = gpt.step(part, state)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-9)
    texts = [gpt.generate(idx[:, :9], 12, temperature=0, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    "keys, want",
    [
        (dict(attention_type="gdn", delta_n_head=3), "n_embd=32 is not a multiple of delta_n_head=3"),
        (dict(attention_type="kda", delta_expand_v=0.01), "delta_expand_v=0.01 of n_embd=32: write at least 0.03125"),
        (dict(attention_type="gdn", delta_gate_min=-1.0), "delta_gate_min belongs to attention_type=kda"),
        (dict(attention_type="mamba2", mamba2_groups=2), "mamba2_groups=2 does not divide the 1 heads"),
        (dict(attention_type="mamba2", mamba2_n_head=64, mamba2_expand=0.2), "write at least 2, one channel"),
        (dict(attention_type="softmax", mamba2_state=8), "mamba2_state belongs to attention_type=mamba2"),
        (dict(delta_conv=2), "delta_conv belongs to attention_type=deltanet|gdn|kda"),
    ],
)
def test_wrong_keys_are_refused(keys, want):
    with pytest.raises(ValueError) as caught:
        GPTConfig(n_head=2, n_embd=32, vocab_size=8, **keys)
    assert want in str(caught.value) and "\n" not in str(caught.value)
