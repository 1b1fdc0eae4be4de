"""A GPT whose attention is looked up by name. For one of your own, edit this file, or name yours with --plugin.

Shapes: B batch, T tokens, C = n_embd, H heads, D head size, V vocabulary. The parameter tree is nanoGPT's, and for
`attention_type=softmax` so are the parameter names, so that its checkpoints and GPT-2's weights load.

The attention protocol, the same for each type:

    y, penalty = attn(x)                     # training; x, y (B, T, C), penalty a float32 scalar, 0 in eval()
    state = attn.init_state(batch, max_len)  # decoding state
    y, state = attn.step(x, state)           # x (B, t, C), t >= 1; over any split of a sequence it equals attn(x)
    attn.flops(T)                            # (nominal, executed) operations of one sequence, without projections
    attn.stats(x=None)                       # tensors for logs and plots
"""

import functools
import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from config import build, key, stray_key
from formats import read_pretrained
from kernels import causal
from kernels.delta import delta, operations as delta_operations
from kernels.distance import BandCache, distance, operations as distance_operations
from kernels.gated import executed_pairs as gated_pairs, gated, gated_map
from kernels.gla import compute_dtype, gla, operations as gla_operations
from kernels.gsa import gsa, operations as gsa_operations
from kernels.nsa import nsa_compressed, nsa_selected, nsa_sizes, nsa_window, operations as nsa_operations
from kernels.performer import feature_map, operations as performer_operations, performer, random_features
from plugins import import_plugins, register, unknown_type  # noqa: F401
from weights import ModelError, check_stored, load_weights, read_checkpoint


@dataclass
class GPTConfig:
    """Model"""

    block_size: int = key(1024, "tokens of context", low=1)
    vocab_size: int = key(0, "number of token ids; 0: the data set's", low=0)
    n_layer: int = key(12, "blocks", low=1, high=10_000)
    n_head: int = key(12, "heads of softmax attention", low=1)
    n_embd: int = key(768, "width of the residual stream", low=1)
    head_dim: int = key(0, "size of a head; 0: n_embd / n_head", low=0)
    dropout: float = key(0.0, "dropout on embeddings, attention and residuals", low=0.0, high=0.999)
    bias: bool = key(False, "biases in linear layers and LayerNorms")
    attention_type: str = key("softmax", "one attention type, or a comma pattern cycled over the layers")
    plugin: str = key("", "file, or files, that register attention types of your own", act=import_plugins)
    pos_emb: str = key(
        "learned", "positions; gla, gsa, the delta rule and mamba2 take no rope", choices=("learned", "rope", "none")
    )
    rope_base: float = key(10000.0, "base of the rotary frequencies", low=1.0)
    mlp: str = key("gelu", "the MLP of a block", choices=("gelu", "swiglu", "none"))
    mlp_hidden: int = key(0, "hidden width of the MLP; 0: 4 n_embd for gelu, 8/3 n_embd for swiglu", low=0)
    gelu: str = key("erf", "GELU by the error function, or GPT-2's tanh approximation", choices=("erf", "tanh"))
    norm: str = key("layernorm", "normalisation", choices=("layernorm", "rmsnorm", "none"))
    embedding: str = key("tied", "token embedding and output head", choices=("tied", "untied", "onehot"))

    n_kv_head: int = key(0, "heads of keys and values; 0: n_head", "softmax", "gated_output", low=0)
    window: int = key(0, "tokens that a query sees, itself the last; 0: all", "softmax", "gated_output", low=0)
    qk_norm: bool = key(False, "RMSNorm of each head's queries and keys", "softmax family")
    span_max: int = key(0, "largest span, in tokens; 0: block_size", "adaptive_span", low=0)
    span_init: float = key(0.5, "first span, as a share of the largest", "adaptive_span", low=0.0, high=1.0)
    span_reg: float = key(2e-6, "penalty for each key that a query needs (mean over heads)", "adaptive_span", low=0.0)
    span_param: str = key(
        "sigmoid", "span from its parameter: smooth, or clamped", "adaptive_span", choices=("sigmoid", "ratio")
    )
    softness_span_mask: float = key(32.0, "tokens over which the mask falls to 0", "adaptive_span", low=1.0)
    use_triangle_wave_masking: bool = key(False, "a learned periodic mask as well", "adaptive_span")
    period_min_triangle_wave_masking: float = key(2.0, "shortest period, in tokens", "adaptive_span", low=1.0)
    period_max_triangle_wave_masking: float = key(8.0, "longest period, in tokens", "adaptive_span", low=1.0)
    mask_mix_candidates: str = key(
        "offset_0,offset_1,offset_2,offset_3,offset_4",
        "masks to mix: offset_K, window_K, every_K, first_K (K <= 16), full",
        "mask_mix",
    )
    mask_mix_per_head: bool = key(False, "weights for each head, not for each layer", "mask_mix")
    mask_mix_reg: float = key(0.0, "penalty on the entropy of the weights", "mask_mix", low=0.0)
    mask_mix_prune: float = key(0.0, "weights below this share of the largest are 0", "mask_mix", low=0.0, high=1.0)
    gla_n_head: int = key(0, "heads; 0: one for each 128 of n_embd", "gla", low=0)
    gla_expand_k: float = key(0.5, "width of all keys, as a share of n_embd", "gla", low=0.01)
    gla_expand_v: float = key(1.0, "width of all values, as a share of n_embd", "gla", low=0.01)
    gla_gate: str = key(
        "vector", "decays: of channels, heads, or constants as in RetNet", "gla", choices=("vector", "scalar", "fixed")
    )
    gla_gate_rank: int = key(16, "rank of the gate's projection", "gla", low=1)
    gla_gate_normalizer: float = key(16.0, "root of the gate: larger remembers longer", "gla", low=0.1)
    gla_gate_min: float | None = key(-1.25, "bound of the log-gate; None: none, by the exact form", "gla", high=0.0)
    gsa_n_head: int = key(0, "heads; 0: one for each 128 of n_embd", "gsa", low=0)
    gsa_slots: int = key(64, "slots of a head", "gsa", low=1)
    gsa_gate_normalizer: float = key(8.0, "root of the gate: larger remembers longer", "gsa", low=0.1)
    gsa_gate_min: float | None = key(None, "bound of the log-gate: from -1.25 up less work on a GPU", "gsa", high=0.0)
    delta_n_head: int = key(0, "heads; 0: one for each 128 of n_embd", "delta rule", low=0)
    delta_expand_v: float = key(1.0, "width of all values, as a share of n_embd", "delta rule", low=0.01)
    delta_conv: int = key(4, "tokens of the convolution over q, k and v; 0: none", "delta rule", low=0, high=64)
    delta_beta_max: float = key(1.0, "largest b_t; above 1 a state can change sign", "delta rule", low=0.01, high=2.0)
    delta_gate_min: float = key(-5.0, "bound of the log-gate of a channel", "kda", high=0.0)
    mamba2_n_head: int = key(0, "heads; 0: one for each 64 of their channels", "mamba2", low=0)
    mamba2_expand: float = key(2.0, "channels of all heads, as a share of n_embd", "mamba2", low=0.01)
    mamba2_state: int = key(64, "numbers that a channel remembers", "mamba2", low=1)
    mamba2_groups: int = key(1, "groups of heads; a group has one key and one query", "mamba2", low=1)
    mamba2_conv: int = key(4, "tokens of the convolution over x, B and C; 0: none", "mamba2", low=0, high=64)
    performer_features: str = key("softmax", "feature map", "performer", choices=("softmax", "relu", "learned"))
    performer_num_features: int = key(0, "features of a head; 0: d ln d, to a power of two", "performer", low=0)
    performer_redraw_interval: int = key(1000, "steps between draws of random features; 0: one", "performer", low=0)
    performer_max_norm2: float = key(4.0, "bound of the squared norm of q and k", "performer", low=0.01, high=8.0)
    nsa_kv_head: int = key(0, "heads of keys and values; 0: one for four of n_head, else n_head", "nsa", low=0)
    nsa_compress: str = key("mlp", "how a block becomes one key and one value", "nsa", choices=("mlp", "mean"))
    nsa_compress_block: int = key(0, "tokens of a compressed block; 0: by block_size", "nsa", low=0)
    nsa_compress_stride: int = key(0, "tokens from one compressed block to the next; 0: by block_size", "nsa", low=0)
    nsa_select_block: int = key(0, "tokens of a selected block; 0: by block_size", "nsa", low=0)
    nsa_select_count: int = key(0, "selected blocks, three of them fixed; 0: by block_size", "nsa", low=0)
    nsa_window: int = key(0, "tokens of the window; 0: by block_size", "nsa", low=0)
    gated_reg: float = key(0.0, "penalty on gates that several heads open to one pair", "gated", low=0.0)
    gated_unit_norm: bool = key(False, "values and output of each head by vectors of norm 1", "gated")
    gate_output: bool = key(False, "a sigmoid gate on the heads' output", "output gate")
    gate_output_kind: str = key(
        "elementwise", "a gate for each channel or for each head", "output gate", choices=("elementwise", "headwise")
    )
    gate_output_bias_init: float = key(0.0, "first bias of these gates: large is open", "output gate")
    qkv_bias: bool = key(False, "biases of q, k and v alone", "softmax family")
    attention_init: str = key(
        "normal", "weights of attention: normal of 0.02, or Xavier's", "softmax family", choices=("normal", "xavier")
    )

    def __post_init__(self):
        for name in self.types():
            if name not in ATTENTION:
                raise ValueError(unknown_type(name, self.plugin, ATTENTION))
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; or set head_dim")
        if self.pos_emb == "rope" and self.d_head % 2:
            raise ValueError(f"pos_emb=rope rotates pairs: the head size must be even, not {self.d_head} (head_dim)")
        if self.embedding == "onehot" and self.vocab_size and self.vocab_size != self.n_embd:
            raise ValueError(f"embedding=onehot needs n_embd={self.vocab_size}, the vocabulary, not {self.n_embd}")
        for field in fields(self):
            stray = stray_key(field, self.attention_type, (GPTConfig,))
            if stray and getattr(self, field.name) != field.default:
                raise ValueError(stray)
        for name in set(self.types()):
            ATTENTION[name].check(self)

    @staticmethod
    def attention_types():
        """{type: the families that it shares keys with}"""
        return {name: kind.families for name, kind in ATTENTION.items()}

    def without_positions(self):
        """The types that pos_emb=rope does not reach."""
        return [n for n in dict.fromkeys(self.types()) if self.pos_emb == "rope" and not ATTENTION[n].positions]

    def types(self):
        """The attention type of each layer, the pattern cycled over the layers."""
        pattern = [name.strip() for name in self.attention_type.split(",")]
        return [pattern[i % len(pattern)] for i in range(max(self.n_layer, len(pattern)))]

    @property
    def d_head(self):
        return self.head_dim or self.n_embd // self.n_head


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich 2019) with its weight in the precision of x: mixed, PyTorch has no fused kernel."""

    def __init__(self, width):
        super().__init__(width, eps=1e-5)

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


# -----------------------------------------------------------------------------
# what every attention is


class Attention(nn.Module):
    """An attention type. A new one defines `__init__(config)`, the four methods that raise here, and overrides of the
    rest what it has. x and y are (B, T, C), B sequences of T tokens; q, k and v are (B, T, H, D) in every type."""

    mask_parameters = ()  # names of the parameters of masks: with mask_learning_rate, without weight decay
    parts = {}  # {name: rows} of the fused projection c_attn, in order: loading copies the parts that two types share
    meaning = {}  # {parameter: what its numbers mean}: loading copies numbers between layers that agree
    positions = False  # whether pos_emb=rope turns its queries and keys
    families = ()  # owners of the keys that it shares with other types
    token_weights = ()  # names of its own weights that multiply each token, beside those of linear layers
    keeps_keys = False  # whether its decoding state holds keys, and grows with the context

    @classmethod
    def check(cls, config):
        """ValueError, of one line, where keys of this type do not fit each other."""

    def make_masks(self, config):
        """Set the parameters of masks. Counting operations without weights calls it alone."""

    def initialise(self, config):
        """First values of linear layers, which the model draws anew after __init__, weights at 0.02, biases 0."""

    def forward(self, x):
        """x -> y, and a penalty that is added to the loss: a float32 scalar, 0 in eval()."""
        raise NotImplementedError

    def init_state(self, batch, max_len):
        """The state of an empty sequence, for decoding; max_len tokens of context."""
        raise NotImplementedError

    def step(self, x, state):
        """x (B, t, C), the next t >= 1 tokens -> y (B, t, C) and the state after them. Over any split of a sequence it
        equals `forward`."""
        raise NotImplementedError

    def flops(self, T):
        """(nominal, executed) operations of one sequence, projections excluded: those of the definition, and those
        that a training step executes."""
        raise NotImplementedError

    def stats(self, x=None):
        """{name: tensor} for logs and plots: of the parameters alone, and of the input x (B, T, C) if it is given."""
        return {}

    def redraw(self, step):
        """Called before training step `step`: new random numbers where they are due."""


def check_heads(total, n_head, name, of="n_embd"):
    if n_head and total % n_head:
        raise ValueError(f"{of}={total} is not a multiple of {name}={n_head}")


class NoAttention(Attention):
    """Zero output and no parameters: the control that each type must beat, and the template of a new one. With
    `mlp_hidden` widened it has as many parameters as the model it stands beside."""

    def __init__(self, config):
        super().__init__()

    def forward(self, x):
        return torch.zeros_like(x), torch.zeros((), device=x.device)

    def init_state(self, batch, max_len):
        return None

    def step(self, x, state):
        return torch.zeros_like(x), state

    def flops(self, T):
        return 0, 0


def rotate(x, offset, base):
    """Rotary positions (Su et al. 2021, eq. 34): pair (d, d + D/2) of the vector at position p = offset + t turns by
    the angle p base^(-2d/D). x (B, T, H, D). Without a base: x."""
    if base is None:
        return x
    of, mode = (
        (turns.__wrapped__, None) if torch.compiler.is_compiling() else (turns, torch.is_inference_mode_enabled())
    )
    cos, sin = of(offset, x.shape[1], x.shape[3], base, x.dtype, x.device, mode)  # autograd refuses inference's own
    return torch.addcmul(x * cos, x.roll(x.shape[3] // 2, -1), sin)


@functools.lru_cache(maxsize=4)  # queries and keys of all layers turn alike
def turns(offset, T, D, base, dtype, device, mode):
    """cos and sin (T, 1, D) of the angles, negative in the first half. Angles are integers of 2^-64 turns: products
    overflow just as turns wrap around, so every position is exact without float64, which some devices lack."""
    frequency = [round(base ** (-2 * d / D) / math.tau * 2**64) for d in range(D // 2)]
    position = offset + torch.arange(T, device=device)  # a compiled step has its offset in a tensor
    phase = position[:, None] * torch.tensor([-f for f in frequency] + frequency, device=device)  # -1/2 to 1/2 turns
    angle = phase.to(torch.float64 if dtype == torch.float64 else torch.float32) * (math.tau / 2**64)
    return angle.cos().to(dtype)[:, None], angle.sin().to(dtype)[:, None]


@dataclass
class KVCache:
    """Keys and values of the last tokens, (B, H, 2 max_len, D) from the first step on; slots [0, n) are filled, in
    order of time. A ring of twice the window, so that the window is always one slice: when it is full the last max_len
    move to the front."""

    max_len: int
    n: int = 0
    k: torch.Tensor = None
    v: torch.Tensor = None


# -----------------------------------------------------------------------------
# softmax attention and what is built on it


class SoftmaxAttention(Attention):
    """Causal softmax attention (Vaswani et al. 2017, eq. 1), by head:

        o_t = sum_{s <= t} p_ts v_s,   p_t = softmax_s(q_t . k_s / sqrt(D))

    A window keeps s > t - window; dropout then acts on the residual, not on p. With fewer heads of keys and values,
    n_kv_head, groups of heads share them. Decoding keeps a ring of the last max_len (or window) keys and values."""

    positions = keeps_keys = True
    families = ("softmax family", "output gate")

    @classmethod
    def check(cls, config):
        check_heads(config.n_head, config.n_kv_head, "n_kv_head", "n_head")

    def __init__(self, config):
        super().__init__()
        self.n_head, self.d_head, self.window = config.n_head, config.d_head, config.window
        self.n_kv = config.n_kv_head or self.n_head
        rows, shared = self.n_head * self.d_head, self.n_kv * self.d_head
        self.parts = dict(q=rows, k=shared, v=shared)  # the rows of c_attn
        self.ln_q, self.ln_k = (RMSNorm(self.d_head) if config.qk_norm else None for _ in "qk")
        self.c_attn = nn.Linear(config.n_embd, sum(self.parts.values()), bias=config.bias or config.qkv_bias)
        self.output_gate = OutputGate(config, self.n_head, self.d_head)
        self.c_proj = nn.Linear(self.n_head * self.d_head, config.n_embd, bias=config.bias)
        self.resid_dropout = make_dropout(config)
        self.dropout = config.dropout
        self.rope_base = config.rope_base if config.pos_emb == "rope" else None

    def forward(self, x):
        q, k, v = self._qkv(x, 0)
        if 0 < self.window < x.size(1):
            k, v = (t.repeat_interleave(self.n_head // self.n_kv, 2) for t in (k, v))  # (B, T, H, D)
            y = distance(q, k, v, self._band(x.size(1), x.device))
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H or Hk, T, D)
            y = causal(q, k, v, self.dropout if self.training else 0.0).transpose(1, 2)
        return self._project(y, x), torch.zeros((), device=x.device)

    def _band(self, T, device=None):
        """The log-mask of distances, (1, T): 0 in the window."""
        far = torch.arange(T, device=device)[None]
        return torch.zeros(far.shape, device=device).masked_fill(far >= self.window, -math.inf)

    def init_state(self, batch, max_len):
        return KVCache(min(self.window or max_len, max_len))

    def step(self, x, state):
        """A prompt longer than the window goes in pieces; a query sees itself and the max_len - 1 tokens before it."""
        L, t = state.max_len, x.size(1)
        if t > L:
            return torch.cat([self.step(piece, state)[0] for piece in x.split(L, 1)], 1), state
        if state.n + t > 2 * L:
            self._move_to_front(state)
        n, m = state.n, state.n + t
        q, k, v = (t.transpose(1, 2) for t in self._qkv(x, n))  # (B, H, t, D)
        if state.k is None:
            state.k, state.v = (z.new_empty(*z.shape[:2], 2 * L, z.size(3)) for z in (k, v))
        state.k[:, :, n:m], state.v[:, :, n:m], state.n = k, v, m
        first = max(0, n + 1 - L)  # the oldest key that the first query sees
        k, v, mask = state.k[:, :, first:m], state.v[:, :, first:m], None
        if t > 1 and n:
            distance = torch.arange(n, m, device=x.device)[:, None] - torch.arange(first, m, device=x.device)
            mask = (distance >= 0) & (distance < L)
        return self._project(self._read(x, q, k, v, mask).transpose(1, 2), x), state

    def _read(self, x, q, k, v, mask):
        """The step's attention, (B, H, t, D). Without a mask: one query, or the causal start of a sequence."""
        options = dict(is_causal=mask is None and q.size(2) > 1, enable_gqa=self.n_kv < self.n_head)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)

    def flops(self, T):
        """The pairs of a query and the keys up to it, twice: what tiles PyTorch's kernel takes is its own affair."""
        if 0 < self.window < T:
            return distance_operations(self._band(T), None, self.n_head, self.d_head, self.d_head)
        pairs = T * (T + 1) // 2
        return (4 * self.n_head * self.d_head * pairs,) * 2

    @torch.no_grad()
    def stats(self, x=None):
        """With x (B, T, C): the attention map (H, T, T) of the first sequence; by head, (H,), the largest logit and the
        weight on the first token, means over queries; and the mean output gate."""
        if x is None:
            return {}
        q, k, _ = (t.transpose(1, 2) for t in self._qkv(x, 0))
        logits = (q @ k.repeat_interleave(self.n_head // self.n_kv, 1).mT).float() / math.sqrt(self.d_head)
        seen = torch.ones_like(logits, dtype=torch.bool).tril()  # (B, H, T, T)
        logits = logits.masked_fill(~(seen.triu(1 - self.window) if self.window else seen), -math.inf)
        p, largest = logits.softmax(-1), logits.amax((0, 2, 3))
        found = {"attention_map": p[0], "first_token": p[..., 0].mean((0, 2)), "max_logit": largest}
        return found | self.output_gate.stats(x)

    def _qkv(self, x, offset):
        """q (B, T, H, D), k and v (B, T, Hk, D) of tokens from position `offset` on."""
        qk, v = self.c_attn(x).unflatten(-1, (-1, self.d_head)).split([self.n_head + self.n_kv, self.n_kv], 2)
        if self.ln_q is not None:
            q, k = qk.split([self.n_head, self.n_kv], 2)
            qk = torch.cat((self.ln_q(q), self.ln_k(k)), 2)
        return *rotate(qk, offset, self.rope_base).split([self.n_head, self.n_kv], 2), v

    def _project(self, y, x):
        """y (B, T, H, D) -> (B, T, C)"""
        return self.resid_dropout(self.c_proj(self.output_gate(y.flatten(2), x)))

    @torch.no_grad()
    def initialise(self, config):
        """attention_init=xavier: Xavier's normal of the weights as tensors (H, C, D) and (H, D, C), and of the biases
        (H, D): for toys of one layer and few channels, where 0.02 is too small to begin with."""
        if config.attention_init != "xavier":
            return
        H, C, D = self.n_head, self.c_attn.in_features, self.d_head
        self.c_attn.weight.normal_(std=math.sqrt(2 / (D * (C + H))))
        self.c_proj.weight.normal_(std=math.sqrt(2 / (C * (D + H))))
        if self.c_attn.bias is not None:
            self.c_attn.bias.normal_(std=math.sqrt(2 / (D + H)))

    def _move_to_front(self, state):
        """Only differences of positions matter to rotary keys: turning them back keeps the angles small for ever."""
        keep = min(state.n, state.max_len)
        k = state.k[:, :, state.n - keep : state.n].clone()
        k = rotate(k.flatten(0, 2)[:, None, None], keep - state.n, self.rope_base)
        state.k[:, :, :keep] = k.view_as(state.k[:, :, :keep])
        state.v[:, :, :keep] = state.v[:, :, state.n - keep : state.n].clone()
        state.n = keep


class OutputGate(nn.Module):
    """Y * sigmoid(X W^T + b) of the heads' output Y, before the output projection (Qiu et al. 2025, arXiv 2505.06708);
    X is what the queries are made of. A gate for each channel (H D rows of W) or for each head (H rows). Without
    gate_output, Y."""

    token_weights = ("weight",)

    def __init__(self, config, n_head, d_head):
        super().__init__()
        rows = n_head * (d_head if config.gate_output_kind == "elementwise" else 1)
        self.n_head, self.repeat = n_head, n_head * d_head // rows
        on = config.gate_output
        self.weight = nn.Parameter(0.02 * torch.randn(rows, config.n_embd)) if on else None
        self.bias = nn.Parameter(torch.full((rows,), config.gate_output_bias_init)) if on else None

    def forward(self, y, x):
        """y (B, T, H D), x (B, T, C)"""
        if self.weight is None:
            return y
        return y * F.linear(x, self.weight, self.bias).sigmoid().repeat_interleave(self.repeat, -1)

    def stats(self, x):
        """The mean gate of each head, (H,)."""
        if self.weight is None:
            return {}
        gate = F.linear(x, self.weight, self.bias).sigmoid().unflatten(-1, (self.n_head, -1))
        return {"output_gate": gate.mean((0, 1, 3))}


class GatedOutput(SoftmaxAttention):
    """Softmax attention with a gate on its output: gate_output=True by name."""

    def __init__(self, config):
        super().__init__(replace(config, gate_output=True))


class UnitLinear(nn.Linear):
    """A linear layer that uses its weight with the rows from `first` on (dim=1), or the columns (dim=0), at norm 1."""

    def __init__(self, *shape, first=0, dim, bias):
        super().__init__(*shape, bias=bias)
        self.first, self.dim = first, dim

    def forward(self, x):
        w = torch.cat((self.weight[: self.first], F.normalize(self.weight[self.first :], dim=self.dim)))
        return F.linear(x, w, self.bias)


class GatedAttention(SoftmaxAttention):
    """Softmax attention with a gate for each head and pair (github.com/cmathw/gated-attn), after the softmax:

        o_t = sum_{s <= t} gamma_ts p_ts v_s,   gamma_ts = clamp(a_t b_s, 0, 1),   a, b = x . w / sqrt(C) + beta

    with weights w and a bias beta for queries (a) and for keys (b). The penalty is gated_reg times the mean over causal
    pairs of (sum_h gamma_h^0.6)^(1 / 0.6): least where one head has a pair to itself, so that what softmax heads do
    together, in superposition, comes apart. Gates begin open: w = 0 and beta = 1 is softmax, and still learns."""

    mask_parameters = ("gate", "gate_bias")
    token_weights = ("gate",)

    def __init__(self, config):
        super().__init__(replace(config, n_kv_head=0, window=0))  # those keys are of other layers
        C, inner = config.n_embd, self.n_head * self.d_head
        self.gate = nn.Parameter(torch.zeros(2, self.n_head, C))
        self.gate_bias = nn.Parameter(torch.ones(2 * self.n_head))
        if config.gated_unit_norm:
            bias = self.c_attn.bias is not None
            self.c_attn = UnitLinear(C, 3 * inner, first=2 * inner, dim=1, bias=bias)
            self.c_proj = UnitLinear(inner, C, dim=0, bias=config.bias)
        self.reg = config.gated_reg

    def forward(self, x):
        q, k, v = super()._qkv(x, 0)
        y, shared = gated(q, k, v, *self._gates(x), penalise=self.training and self.reg > 0)
        return self._project(y, x), self.reg * shared.float()

    def _gates(self, x):
        """a and b, (B, T, H) each."""
        gates = F.linear(x, self.gate.flatten(0, 1)) / math.sqrt(x.size(-1)) + self.gate_bias
        return gates.chunk(2, -1)

    def _qkv(self, x, offset):
        """A query's gate is one more channel of it, and a key's one of its value, also in the ring."""
        q, k, v = super()._qkv(x, offset)
        a, b = (gate.unsqueeze(-1).to(v.dtype) for gate in self._gates(x))
        return torch.cat((q, a), -1), k, torch.cat((v, b), -1)  # (B, T, H, D + 1), (B, T, H, D), (B, T, H, D + 1)

    def _read(self, x, q, k, v, mask):
        return self._gated_map(q, k, v, mask)[0].to(v.dtype) @ v[..., :-1]

    def _gated_map(self, q, k, v, mask):
        """gamma p and gamma, (B, H, t, S)."""
        if mask is None and q.size(2) > 1:
            mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril(k.size(2) - q.size(2))
        return gated_map(q[..., :-1], k, q[..., -1], v[..., -1], mask)

    def flops(self, T):
        """Scores, values and gates of all pairs, and of those that the blocks of a training step hold."""
        each = (4 * self.d_head + 2) * self.n_head
        return each * (T * (T + 1) // 2), each * gated_pairs(T, self.n_head)

    @torch.no_grad()
    def stats(self, x=None):
        """With x (B, T, C): the gated attention map (H, T, T) of the first sequence; by head, (H,), the weight on the
        first token, the mean gate, the share of gates that are 0, and whether all of them are; the mean output gate."""
        if x is None:
            return {}
        y, gamma = self._gated_map(*(t.transpose(1, 2) for t in self._qkv(x, 0)), None)
        causal = torch.ones(gamma.shape[-2:], dtype=torch.bool, device=x.device).tril()
        gates = gamma[..., causal].transpose(0, 1).flatten(1).float()  # (H, pairs)
        found = {"attention_map": y[0], "first_token": y[..., 0].float().mean((0, 2)), "gate": gates.mean(1)}
        found |= {"gate_zero": (gates == 0).float().mean(1), "dead": (gates == 0).all(1)}
        return found | self.output_gate.stats(x)

    @torch.no_grad()
    def initialise(self, config):
        """As for softmax attention; gates from the signs of orthogonal vectors: a and b of a token are 0.6 or -0.6, and
        a head begins with some pairs open and the others shut. None is beyond 1, where neither the error nor the
        penalty has a slope: such a gate may stay open for good."""
        super().initialise(config)
        for w in self.gate if config.attention_init == "xavier" else ():
            nn.init.orthogonal_(w).sign_().mul_(0.6 * math.sqrt(w.size(1)))
            self.gate_bias.zero_()


class DistanceAttention(SoftmaxAttention):
    """Softmax attention under a mask of the distance between query and key, for each head h:

        p_ts = m_h(t - s) e^(a_ts) / sum_{s' <= t} m_h(t - s') e^(a_ts'),   a_ts = q_t . k_s / sqrt(D)

    Distances with m = 0 are not computed, in training either, and decoding reads only the others. m is 0 from
    block_size on, also in longer sequences: the ring of decoding keeps no more. A type of this family has `log_mask`,
    `penalty`, `parameter_stats` and `simplify`. Dropout acts on the residual, not on p."""

    constant_ones = False  # whether a mask of ones has no slope, and so costs what softmax attention costs

    def __init__(self, config):
        super().__init__(replace(config, n_kv_head=0, window=0))  # those keys are of other layers
        self.block_size = config.block_size
        self.make_masks(config)

    def forward(self, x):
        y = distance(*self._qkv(x, 0), *self.log_mask(x.size(1)), constant_ones=self.constant_ones)
        penalty = self.penalty().float() if self.training else torch.zeros((), device=x.device)
        return self._project(y, x), penalty

    @torch.no_grad()
    def init_state(self, batch, max_len):
        table, first = self.log_mask(max_len + 1)  # a last column for keys that are further away: the first ones
        return BandCache.of(table.expand(self.n_head, -1), first)

    def step(self, x, state):
        """One token reads its kept keys. Several go through the training form, after the keys that they reach back to;
        with masks of the first keys only at the start of a sequence, and else one by one."""
        t, past = x.size(1), min(state.end, state.reach - 1)
        if t > 1 and state.seen and state.first.size(1):
            return torch.cat([self.step(token, state)[0] for token in x.split(1, 1)], 1), state
        q, k, v = self._qkv(x, state.seen)
        if t == 1:
            state.append(k, v)
            return self._project(state.read(q), x), state
        keys, values = k, v
        if past:
            keys, values = (torch.cat((old, new), 1) for old, new in zip(state.last(past), (k, v)))
            q = F.pad(q, (0, 0, 0, 0, past, 0))
        state.append(k, v)
        y = distance(q, keys, values, *self.log_mask(past + t))[:, past:]
        return self._project(y, x), state

    def flops(self, T):
        return distance_operations(*self.log_mask(T), self.n_head, self.d_head, self.d_head, self.constant_ones)

    @torch.no_grad()
    def stats(self, x=None):
        """Kept distances of each head, (H,), and what the type adds; with x (B, T, C) the attention map (H, T, T)."""
        kept = (self.log_mask(self.block_size)[0] > -math.inf).sum(1).expand(self.n_head)
        stats = {"kept": kept.clone()} | self.parameter_stats()
        if x is not None:
            (q, k, _), T = self._qkv(x[:1], 0), x.size(1)
            eye = torch.eye(T, dtype=q.dtype, device=q.device)[None, :, None].expand(1, T, self.n_head, T)
            y = distance(q, k, eye, *self.log_mask(T), backend="dense")  # values that name their key: (1, T, H, T)
            stats["attention_map"] = y[0].transpose(0, 1)
        return stats


def log_or_drop(mask):
    """log of a mask >= 0; -inf, without gradient, where it is 0."""
    return torch.where(mask > 0, mask.clamp(min=torch.finfo(mask.dtype).tiny).log(), -math.inf)


class Bounded(torch.autograd.Function):
    """clamp(r, 0, 1) whose gradient drops only what would push r further out: r comes back when it is wanted."""

    @staticmethod
    def forward(ctx, r):
        ctx.save_for_backward(r)
        return r.clamp(0, 1)

    @staticmethod
    def backward(ctx, grad):
        (r,) = ctx.saved_tensors
        return grad.masked_fill(((r <= 0) & (grad > 0)) | ((r >= 1) & (grad < 0)), 0.0)


class AdaptiveSpan(DistanceAttention):
    """Adaptive attention span (Sukhbaatar et al. 2019, arXiv 1905.07799, eq. 3) with a learned span z in [0, S] and a
    ramp R for each head, and optionally a periodic mask around the multiples of a learned period P:

        m(x) = clamp((R + z - x) / R, 0, 1) * clamp(1/2 + P (rho + 1/4) - |x - P round(x / P)|, 0, 1)

    The second factor is a triangle wave of slope 1 a token, rho in [-1/4, 1/4]. The penalty is span_reg (z + R) times
    the share of distances in the wave's support, the mean over heads: the keys that a query needs."""

    mask_parameters = ("span", "period", "ratio")
    constant_ones = True  # the clamps are flat there

    @classmethod
    def check(cls, config):
        if config.span_max > config.block_size:
            raise ValueError(f"span_max={config.span_max} is above block_size={config.block_size}; 0 takes all of it")
        low, high = config.period_min_triangle_wave_masking, config.period_max_triangle_wave_masking
        if low >= high:
            raise ValueError(f"period_max_triangle_wave_masking={high:g} must be above period_min...={low:g}")

    def make_masks(self, config):
        self.S, self.R, self.reg = config.span_max or config.block_size, config.softness_span_mask, config.span_reg
        self.sigmoid, self.wave = config.span_param == "sigmoid", config.use_triangle_wave_masking
        init = torch.full((self.n_head,), config.span_init)
        self.span = nn.Parameter(init.clamp(0.001, 0.999).logit() if self.sigmoid else init)
        self.meaning = {"span": (config.span_param, self.S)}  # of a stored number
        if self.wave:
            self.period_range = config.period_min_triangle_wave_masking, config.period_max_triangle_wave_masking
            self.meaning["period"] = self.period_range
            self.period = nn.Parameter(torch.rand(self.n_head).clamp(0.001, 0.999).logit())
            self.ratio = nn.Parameter(torch.zeros(self.n_head))

    def spans(self):
        return self.S * (self.span.sigmoid() if self.sigmoid else Bounded.apply(self.span))  # (H,)

    def periods(self):
        """P and the half-width P (rho + 1/4) of the window around its multiples, (H,) each."""
        low, high = self.period_range
        P = low + (high - low) * self.period.sigmoid()
        return P, P * 0.5 * self.ratio.sigmoid()

    def log_mask(self, T):
        x = torch.arange(T, device=self.span.device)
        mask = ((self.R + self.spans()[:, None] - x) / self.R).clamp(0, 1) * (x < self.block_size)  # (H, T)
        if self.wave:
            P, h = (t[:, None] for t in self.periods())
            mask = mask * (0.5 + h - (x - P * (x / P).round()).abs()).clamp(0, 1)
        return log_or_drop(mask), None

    def penalty(self):
        keys = self.spans() + self.R
        if self.wave:
            P, h = self.periods()
            share = (1 + 2 * h) / P
            keys = keys * torch.where(share < 1, share, 1.5 + h - P / 2)  # beyond 1 the smallest mask value counts
        return self.reg * keys.mean()

    @torch.no_grad()
    def simplify(self, share):
        """Round the periods to whole tokens: those of narrow waves then fall into short dense sequences. Says so."""
        if not self.wave:
            return None
        low, high = self.period_range
        self.period.copy_(((self.periods()[0].round().clamp(low, high) - low) / (high - low)).logit())
        return "with periods rounded to whole tokens"

    def parameter_stats(self):
        stats = {"span": self.spans().detach()}
        if self.wave:
            P, h = self.periods()
            stats |= {"period": P, "offset": h - P / 4}  # the wave's offset P rho
        return stats


def parse_candidate(name):
    """'offset_3' -> ('offset', 3)"""
    kind, _, number = name.strip().partition("_")
    size = int(number) if number.isdecimal() else -1
    low, high = {"offset": (0, 2**20), "window": (1, 2**20), "every": (2, 2**20), "first": (1, 16)}.get(kind, (0, 0))
    if not (kind == "full" and not number) and not (high and low <= size <= high):
        kinds = "offset_K, window_K, every_K, first_K (K up to 16) and full"
        raise ValueError(f"mask_mix_candidates: no mask {name.strip()!r}; write some of {kinds}, comma-separated")
    return kind, size


class MaskMix(DistanceAttention):
    """A learned linear combination of candidate masks, in each layer (or head):

        m(t, s) = sum_n sigmoid(alpha_n) M_n(t, s)

    M_n is 1 for the distance K (offset_K), for distances below K (window_K), for multiples of K (every_K), for the
    first K keys of the sequence (first_K), or for all (full). Softmax makes the scale of the weights irrelevant, so the
    penalty is mask_mix_reg times the entropy of w / sum w: few candidates, not small ones."""

    mask_parameters = ("alpha",)

    @classmethod
    def check(cls, config):
        for name in config.mask_mix_candidates.split(","):
            parse_candidate(name)

    def make_masks(self, config):
        self.candidates = [parse_candidate(name) for name in config.mask_mix_candidates.split(",")]
        self.n_first = max(k if kind == "first" else 0 for kind, k in self.candidates)
        self.reg, self.prune = config.mask_mix_reg, config.mask_mix_prune
        self.alpha = nn.Parameter(torch.zeros(self.n_head if config.mask_mix_per_head else 1, len(self.candidates)))
        self.meaning = {"alpha": self.candidates}

    def weights(self):
        w = self.alpha.sigmoid()  # (H or 1, N)
        return torch.where(w >= self.prune * w.amax(1, keepdim=True), w, 0.0)

    def log_mask(self, T):
        x, w = torch.arange(T, device=self.alpha.device), self.weights()
        shape = {"offset": lambda k: x == k, "window": lambda k: x < k, "every": lambda k: x % k == 0}
        shape |= {"full": lambda k: x >= 0, "first": lambda k: x < 0}
        masks = torch.stack([shape[kind](k) for kind, k in self.candidates]) & (x < self.block_size)
        u = (w[:, :, None] * masks).sum(1)  # (H or 1, T); a product of matrices would lose digits under autocast
        if not self.n_first:
            return log_or_drop(u), None
        s = torch.arange(self.n_first, device=x.device)
        first = torch.stack([(s < k) if kind == "first" else (s < 0) for kind, k in self.candidates])
        f = (w[:, :, None] * first).sum(1)  # (H or 1, P), P = n_first
        return log_or_drop(u), log_or_drop(u[:, None] + f[:, :, None])

    def simplify(self, share):
        """Drop candidates below this share of the largest. Says so."""
        self.prune = share
        return f"without candidates below {share:g} of the largest"

    def penalty(self):
        p = self.alpha.sigmoid()
        p = p / p.sum(1, keepdim=True)
        return self.reg * -(p * p.log()).sum(1).mean()

    def parameter_stats(self):
        return {"weight": self.weights().detach(), "alpha": self.alpha.detach().clone()}


# -----------------------------------------------------------------------------
# linear attention, slots and random features


def check_width(config, name, n_head):
    if round(config.n_embd * getattr(config, name) / n_head) < 1:
        least = f"write at least {n_head / config.n_embd:g}, one channel for each head"
        raise ValueError(f"{name}={getattr(config, name):g} of n_embd={config.n_embd}: {least}")


def full_precision(x):
    return x if x.dtype == torch.float64 else x.float()  # a decay near 1 needs the digits


class GatedLinearAttention(Attention):
    """Gated linear attention (Yang et al. 2023, arXiv 2312.06635, section 4): by head, one decaying K x V matrix

        S_t = diag(a_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K),   y_t = W_o (norm(o_t) * silu(W_r x_t))

    with the decay a_t = sigmoid(W_2 W_1 x_t + b)^(1/normalizer), a low-rank function of the token. With gates bounded
    below by gla_gate_min the chunks are plain matrix products; None takes the exact form for any gate. gla_gate=scalar
    has one decay a head, fixed the constant 1 - 2^(-5-h) of head h: retention (Sun et al. 2023, arXiv 2307.08621)."""

    @classmethod
    def check(cls, config):
        check_heads(config.n_embd, config.gla_n_head, "gla_n_head")
        for name in ("gla_expand_k", "gla_expand_v"):
            check_width(config, name, cls.heads(config))

    @staticmethod
    def heads(config):
        return config.gla_n_head or max(1, config.n_embd // 128)  # few, wide heads: 4 do better than 8 or 16

    def __init__(self, config):
        super().__init__()
        self.n_head = self.heads(config)
        self.d_k = round(config.n_embd * config.gla_expand_k / self.n_head)
        self.d_v = round(config.n_embd * config.gla_expand_v / self.n_head)
        self.gate, rank = config.gla_gate, 0 if config.gla_gate == "fixed" else config.gla_gate_rank
        widths = [self.n_head * d for d in (self.d_k, self.d_k, self.d_v, self.d_v)] + [rank]
        self.parts = dict(zip("qkvrz", widths))  # the rows of c_attn; z is the first factor of the gate
        self.c_attn = nn.Linear(config.n_embd, sum(widths), bias=False)
        self.c_gate = nn.Linear(rank, self.n_head * (self.d_k if self.gate == "vector" else 1)) if rank else None
        self.ln_o = RMSNorm(self.d_v)
        self.c_proj = nn.Linear(self.n_head * self.d_v, config.n_embd, bias=config.bias)
        self.resid_dropout = make_dropout(config)
        self.normalizer, self.gate_min = config.gla_gate_normalizer, config.gla_gate_min

    def forward(self, x):
        q, k, v, g, r = self._inputs(x)
        o, _ = gla(q, k, v, g, gate_min=self.gate_min)
        return self._project(o, r), torch.zeros((), device=x.device)

    def init_state(self, batch, max_len):
        w = self.c_attn.weight
        return torch.zeros(batch, self.n_head, self.d_k, self.d_v, dtype=compute_dtype(w.dtype), device=w.device)

    def step(self, x, state):
        q, k, v, g, r = self._inputs(x)
        o, state = gla(q, k, v, g, gate_min=self.gate_min, initial_state=state, output_final_state=True)
        return self._project(o, r), state

    def flops(self, T):
        return gla_operations(T, self.n_head, self.d_k, self.d_v, self.gate_min, self.gate != "vector")

    @torch.no_grad()
    def stats(self, x=None):
        """With x (B, T, C): the mean decay of each head, (H,), and the norms of the states after x, (H,)."""
        if x is None:
            return {}
        _, _, _, g, _ = self._inputs(x)
        _, state = self.step(x, self.init_state(x.size(0), x.size(1)))
        return {
            "decay": g.exp().mean((0, 1)).view(self.n_head, -1).mean(1),
            "state_norm": state.norm(dim=(2, 3)).mean(0),
        }

    def _inputs(self, x):
        q, k, v, r, z = self.c_attn(x).split(list(self.parts.values()), -1)
        q, k, v = (t.unflatten(-1, (self.n_head, -1)) for t in (q, k, v))  # (B, T, H, K), (B, T, H, K), (B, T, H, V)
        if self.gate == "fixed":
            g = torch.log1p(-(2.0 ** (-5.0 - torch.arange(self.n_head, device=x.device)))).to(compute_dtype(q.dtype))
            return q, k, v, g.expand(q.shape[:3]), r
        g = F.logsigmoid(full_precision(self.c_gate(z))) / self.normalizer
        g = g.unflatten(-1, (self.n_head, -1)) if self.gate == "vector" else g  # (B, T, H, K) or (B, T, H), <= 0
        return q, k, v, g, r

    def _project(self, o, r):
        y = self.ln_o(o).flatten(2) * F.silu(r)  # (B, T, H V)
        return self.resid_dropout(self.c_proj(y))


class GatedSlotAttention(Attention):
    """Gated slot attention (Zhang et al. 2024, arXiv 2409.07146, eq. 8): by head, M slots remember keys and values

        K~_t = diag(a_t) K~_{t-1} + (1 - a_t) k_t^T,   V~_t likewise with v_t,   o_t = V~_t^T softmax(K~_t q_t)

    with a forget gate a_t = sigmoid(W_f x_t)^(1/normalizer) for each slot, whose log gsa_gate_min may bound from below.
    Decoding keeps the slots alone."""

    families = ("output gate",)

    @classmethod
    def check(cls, config):
        check_heads(config.n_embd, config.gsa_n_head, "gsa_n_head")

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_slot = config.gsa_n_head or max(1, config.n_embd // 128), config.gsa_slots
        self.d_head = config.n_embd // self.n_head
        inner = self.n_head * self.d_head
        self.output_gate = OutputGate(config, self.n_head, self.d_head)
        self.parts = dict(q=inner, k=inner, v=inner, f=self.n_head * self.n_slot)  # the rows of c_attn; f forgets
        self.c_attn = nn.Linear(config.n_embd, sum(self.parts.values()), bias=False)
        self.ln_o = RMSNorm(inner)
        self.c_proj = nn.Linear(inner, config.n_embd, bias=config.bias)
        self.resid_dropout = make_dropout(config)
        self.normalizer, self.gate_min = config.gsa_gate_normalizer, config.gsa_gate_min

    def forward(self, x):
        o, _ = gsa(*self._inputs(x), scale=1.0, gate_min=self.gate_min)
        return self._project(o, x), torch.zeros((), device=x.device)

    def init_state(self, batch, max_len):
        w, H, D, M = self.c_attn.weight, self.n_head, self.d_head, self.n_slot
        dtype = compute_dtype(w.dtype)
        return tuple(torch.zeros(shape, dtype=dtype, device=w.device) for shape in ((batch, H, D, M), (batch, H, M, D)))

    def step(self, x, state):
        options = dict(scale=1.0, gate_min=self.gate_min)
        o, state = gsa(*self._inputs(x), initial_state=state, output_final_state=True, **options)
        return self._project(o, x), state

    def flops(self, T):
        return gsa_operations(T, self.n_head, self.d_head, self.d_head, self.n_slot)

    @torch.no_grad()
    def stats(self, x=None):
        """With x (B, T, C): the mean decay of each head, (H,), and of each of its slots, (H, M)."""
        if x is None:
            return {}
        decay = self._inputs(x)[-1].exp().mean((0, 1))
        return {"decay": decay.mean(-1), "slot_decay": decay}

    def _inputs(self, x):
        parts = self.c_attn(x).split(list(self.parts.values()), -1)
        q, k, v, f = (t.unflatten(-1, (self.n_head, -1)) for t in parts)
        g = F.logsigmoid(full_precision(f)) / self.normalizer  # (B, T, H, M)
        g = g if self.gate_min is None else g.clamp(min=self.gate_min)
        s = -torch.expm1(g)  # 1 - a without cancellation: a nearly closed slot still learns
        return F.silu(q), F.silu(k), F.silu(v), s, g  # q, k, v (B, T, H, D)

    def _project(self, o, x):
        y = self.output_gate(self.ln_o(F.silu(o.flatten(2))), x)  # (B, T, H D)
        return self.resid_dropout(self.c_proj(y))


class PerformerAttention(Attention):
    """Performer (Choromanski et al. 2020, arXiv 2009.14794, section 2): by head, M positive features phi whose products
    take the place of e^(q.k), so that sums over the past are a matrix and a vector:

        o_t = S_t^T phi(q_t) / z_t . phi(q_t),   S_t = sum_{s <= t} phi(k_s) v_s^T,   z_t = sum_{s <= t} phi(k_s)

    `softmax`: phi(x) = exp(W x) with Gaussian W estimates softmax attention with an error of 1/sqrt(M), times
    e^(|q + k|^2 / 2): queries and keys are scaled to one norm, learned by head up to performer_max_norm2. (The paper's
    e^(-|x|^2 / 2) is then the same for all keys and cancels.) `relu`: relu(W x) + 1e-3. `learned`: log(1 + exp(W x)), W
    trained, one for queries and one for keys, as in Kerformer (Gan et al. 2023)."""

    positions = True
    families = ("output gate",)

    def __init__(self, config):
        super().__init__()
        self.n_head, self.d_head = H, D = config.n_head, config.d_head
        self.n_feature = M = config.performer_num_features or max(16, 2 ** round(math.log2(D * math.log(D + 1))))
        self.parts = dict.fromkeys("qkv", H * D)  # the rows of c_attn
        self.c_attn = nn.Linear(config.n_embd, 3 * H * D, bias=config.bias)
        self.c_proj = nn.Linear(H * D, config.n_embd, bias=config.bias)
        self.output_gate = OutputGate(config, H, D)
        self.temperature = nn.Parameter(torch.zeros(H))
        self.features, self.max_norm2 = config.performer_features, config.performer_max_norm2
        if self.features == "learned":
            self.w_q, self.w_k = (nn.Parameter(random_features(H, M, D)) for _ in range(2))
        else:
            self.register_buffer("w", random_features(H, M, D))
            self.register_buffer("seed", torch.randint(2**31, ()))
        self.redraw_interval = config.performer_redraw_interval
        self.resid_dropout = make_dropout(config)
        self.rope_base = config.rope_base if config.pos_emb == "rope" else None

    def redraw(self, step):
        """New random features if they are due before training step `step`: a function of the seed and the step, so that
        every process and a resumed run draw the same."""
        if self.features != "learned" and self.redraw_interval and step and step % self.redraw_interval == 0:
            generator = torch.Generator().manual_seed(int(self.seed) + step)
            self.w.copy_(random_features(*self.w.shape, generator))

    def forward(self, x):
        q, k, v = self._qkv(x, 0)
        o, _ = performer(q, k, v, *self._maps(), self.features)
        return self._project(o, x), torch.zeros((), device=x.device)

    def init_state(self, batch, max_len):
        """[S, z] of each head, and the position."""
        w, shape = self.c_attn.weight, (batch, self.n_head, self.n_feature, self.d_head + 1)
        return torch.zeros(shape, dtype=compute_dtype(w.dtype), device=w.device), 0

    def step(self, x, state):
        sums, position = state
        q, k, v = self._qkv(x, position)
        o, sums = performer(q, k, v, *self._maps(), self.features, initial_state=sums, output_final_state=True)
        return self._project(o, x), (sums, position + x.size(1))

    def flops(self, T):
        return performer_operations(T, self.n_head, self.d_head, self.d_head, self.n_feature)

    @torch.no_grad()
    def stats(self, x=None):
        """The squared norm of queries and keys, (H,). With x (B, T, C) also the attention map (H, T, T) of the first
        sequence, and its largest |q + k|^2 (H,), whose exponential is the relative variance of a product, times M."""
        found = {"norm2": self._norm2()}
        if x is not None:
            q, k, _ = self._qkv(x[:1], 0)
            fq, fk = (feature_map(t, w, self.features)[0] for t, w in zip((q, k), self._maps()))  # (T, H, M)
            weights = torch.einsum("ihm,jhm->hij", fq, fk).tril()
            found["attention_map"] = weights / weights.sum(-1, keepdim=True)
            products = torch.einsum("ihd,jhd->hij", q[0], k[0])
            found["pair_norm2"] = 2 * (found["norm2"] + products.amax((1, 2)))
        return found

    def _norm2(self):
        return self.max_norm2 * self.temperature.sigmoid()  # (H,)

    def _maps(self):
        return (self.w_q, self.w_k) if self.features == "learned" else (self.w, self.w)

    def _qkv(self, x, offset):
        qk, v = self.c_attn(x).unflatten(-1, (-1, self.d_head)).split([2 * self.n_head, self.n_head], 2)
        qk = F.normalize(full_precision(qk), dim=-1) * self._norm2().sqrt().repeat(2)[:, None]
        return *rotate(qk, offset, self.rope_base).chunk(2, 2), v

    def _project(self, o, x):
        return self.resid_dropout(self.c_proj(self.output_gate(o.flatten(2), x)))  # (B, T, H D) -> (B, T, C)


# -----------------------------------------------------------------------------
# the delta rule and Mamba-2


class ConvolvedAttention(Attention):
    """What these types share. By head, a K x V matrix S is the state; q, k and v come from a causal convolution of each
    channel over some tokens, and silu. Decoding keeps S and what the convolution still needs. A type has `operator`,
    its `operations` and `options`, `_inputs` and `_gate`. A decay is Mamba-2's: a_t = exp(-A softplus(W_a x_t + c))."""

    def build(self, config, parts, width, n_decay):
        """Parts of c_attn, q, k and v among them; tokens of the convolution; numbers c of the decay."""
        self.parts = parts
        self.c_attn = nn.Linear(config.n_embd, sum(parts.values()), bias=False)
        self.c_proj = nn.Linear(self.n_head * self.d_v, config.n_embd, bias=config.bias)
        self.resid_dropout = make_dropout(config)
        self.conv_shape, bound = (width, parts["q"] + parts["k"] + parts["v"]), max(1, width) ** -0.5
        weight = torch.empty(math.prod(self.conv_shape)).uniform_(-bound, bound)  # a vector: no weight decay, no Muon
        self.conv = nn.Parameter(weight) if width else None
        if n_decay:  # as published: A from 1 to 16, the softplus log-uniform from 0.001 to 0.1
            self.dt_bias = nn.Parameter(
                torch.empty(n_decay).uniform_(math.log(0.001), math.log(0.1)).exp().expm1().log()
            )
            self.log_a = nn.Parameter(torch.empty(self.n_head).uniform_(1, 16).log())

    def forward(self, x):
        return self._mix(x, (None, None))[0], torch.zeros((), device=x.device)

    def init_state(self, batch, max_len):
        w, (width, channels) = self.c_attn.weight, self.conv_shape
        S = torch.zeros(batch, self.n_head, self.d_k, self.d_v, dtype=compute_dtype(w.dtype), device=w.device)
        return S, (w.new_zeros(batch, 1, channels),) * (width - 1)

    def step(self, x, state):
        return self._mix(x, state)

    def flops(self, T):
        return self.operations(T, self.n_head, self.d_k, self.d_v, self.options.get("gate_min"))

    @torch.no_grad()
    def stats(self, x=None):
        """With x (B, T, C), by head, (H,): the mean decay, if there is one, and the norm of the states after x."""
        if x is None:
            return {}
        (*_, g), _, _ = self._inputs(x, None)
        _, (S, _) = self.step(x, self.init_state(x.size(0), x.size(1)))
        found = {"state_norm": S.norm(dim=(2, 3)).mean(0)}
        return found if g is None else found | {"decay": g.exp().mean((0, 1)).view(self.n_head, -1).mean(1)}

    def _mix(self, x, state):
        inputs, rest, past = self._inputs(x, state[1])
        o, S = self.operator(*inputs, initial_state=state[0], output_final_state=True, **self.options)
        return self.resid_dropout(self.c_proj(self._gate(o, *rest))), (S, past)

    def _convolved(self, x, past):
        """q, k, v side by side (B, T, channels), the parts of c_attn after them, and the convolution's next `past`."""
        (B, T, _), (width, channels), sizes = x.shape, self.conv_shape, list(self.parts.values())
        x, *rest = self.c_attn(x).split([channels, *sizes[3:]], -1)
        if width:
            taps = *(past or [x.new_zeros(B, 1, channels)] * (width - 1)), x
            if T > 1:  # one token is decoded without copies
                seen = torch.cat(taps, 1)
                taps = [seen[:, i : i + T] for i in range(width)]
            past, w = [tap[:, -1:].clone() if T > 1 else tap for tap in taps[1:]], self.conv.view(width, channels)
            x = taps[0] * w[0]
            for tap, weight in zip(taps[1:], w[1:]):
                x = torch.addcmul(x, tap, weight)
        return F.silu(x), rest, past

    def _decay(self, a):
        """W_a x (B, T, H or H K) -> the softplus and log a_t, (B, T, H, 1 or K)."""
        dt = F.softplus(full_precision(a) + self.dt_bias).unflatten(-1, (self.n_head, -1))
        return dt, -self.log_a.exp()[:, None] * dt


class DeltaNet(ConvolvedAttention):
    """The delta rule (Yang et al. 2024, arXiv 2406.06484, section 2.2): the state's answer to a key is corrected,

        S_t = S~_t + b_t k_t (v_t - S~_t^T k_t)^T,   S~_t = a_t S_{t-1},   o_t = S_t^T q_t / sqrt(K)
        y_t = W_o (norm(o_t) * gate(x_t)),   b_t = beta_max sigmoid(W_b x_t)

    with q and k of norm 1. Here a_t = 1, and the gate is silu."""

    families = ("delta rule",)
    operator, operations = staticmethod(delta), staticmethod(delta_operations)
    decay = None  # what has a decay of its own: nothing, each "head" or each "channel"

    @classmethod
    def check(cls, config):
        check_heads(config.n_embd, config.delta_n_head, "delta_n_head")
        check_width(config, "delta_expand_v", cls.heads(config))

    @staticmethod
    def heads(config):
        return config.delta_n_head or max(1, config.n_embd // 128)

    def __init__(self, config):
        super().__init__()
        self.n_head = H = self.heads(config)
        self.d_k, self.d_v = config.n_embd // H, round(config.n_embd * config.delta_expand_v / H)
        K, V, rank = H * self.d_k, H * self.d_v, min(self.d_v, max(16, config.n_embd // 16))  # published: 128 of 2,048
        kinds = {None: (dict(r=V), 0), "head": (dict(r=V, a=H), H), "channel": (dict(r=rank, a=rank), K)}
        own, n_decay = kinds[self.decay]  # r: gate, a: decay, or the first factor of their weights
        self.build(config, dict(q=K, k=K, v=V, b=H) | own, config.delta_conv, n_decay)
        self.ln_o = RMSNorm(self.d_v)
        self.beta_max, self.options = config.delta_beta_max, {}
        if self.decay == "channel":
            self.c_decay, self.c_gate = nn.Linear(rank, K, bias=False), nn.Linear(rank, V)
            self.options = dict(gate_min=config.delta_gate_min)

    def _inputs(self, x, past):
        qkv, (b, r, *a), past = self._convolved(x, past)
        parts = zip(qkv.tensor_split([2 * self.n_head * self.d_k], -1), (self.d_k, self.d_v))
        qk, v = (t.unflatten(-1, (-1, D)) for t, D in parts)  # (B, T, 2 H, K), (B, T, H, V)
        q, k = F.normalize(full_precision(qk), dim=-1).chunk(2, 2)
        if self.decay == "channel":
            r, g = self.c_gate(r).sigmoid(), self._decay(self.c_decay(*a))[1]  # g (B, T, H, K)
        else:
            r, g = F.silu(r), self._decay(*a)[1].squeeze(-1) if a else None  # g (B, T, H)
        return (q, k, v, self.beta_max * full_precision(b).sigmoid(), g), (r,), past

    def _gate(self, o, r):
        return self.ln_o(o).flatten(2) * r  # (B, T, H V)


class GatedDeltaNet(DeltaNet):
    """Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): the delta rule with a decay for each head."""

    decay = "head"


class KimiDeltaAttention(DeltaNet):
    """Kimi delta attention (Kimi Team 2025, arXiv 2510.26692): a decay for each channel, bounded below by
    delta_gate_min, and a sigmoid gate; the weights of both have low rank."""

    decay = "channel"


class Mamba2(ConvolvedAttention):
    """Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, sections 3 and 7): a step dt_t sets the decay and weighs what comes,

        S_t = exp(-dt_t A) S_{t-1} + B_t (dt_t x_t)^T,   o_t = S_t^T C_t + D x_t,   y_t = W_o norm(o_t * silu(z_t))

    with dt_t = softplus(W_a u_t + c) of the layer's input u. The convolution gives x, B and C; heads of a group share B
    and C, their keys and queries."""

    operator, options = staticmethod(gla), dict(scale=1.0)
    operations = staticmethod(functools.partial(gla_operations, scalar=True))

    @classmethod
    def check(cls, config):
        check_width(config, "mamba2_expand", H := cls.heads(config))
        if H % config.mamba2_groups:
            raise ValueError(f"mamba2_groups={config.mamba2_groups} does not divide the {H} heads (mamba2_n_head)")

    @staticmethod
    def heads(config):
        return config.mamba2_n_head or max(1, int(config.mamba2_expand * config.n_embd) // 64)

    def __init__(self, config):
        super().__init__()
        self.n_head = H = self.heads(config)
        self.d_k, self.d_v = config.mamba2_state, round(config.mamba2_expand * config.n_embd / H)
        BC, inner = config.mamba2_groups * self.d_k, H * self.d_v
        self.build(config, dict(q=BC, k=BC, v=inner, z=inner, a=H), config.mamba2_conv, H)  # q, k, v are C, B, x
        self.skip, self.ln_o = nn.Parameter(torch.ones(H)), RMSNorm(inner)

    def _inputs(self, x, past):
        qkv, (z, a), past = self._convolved(x, past)
        parts = zip(qkv.split(list(self.parts.values())[:3], -1), (self.d_k, self.d_k, self.d_v))
        q, k, v = (t.unflatten(-1, (-1, D)) for t, D in parts)  # (B, T, groups, N) twice, (B, T, H, P)
        q, k = (t.repeat_interleave(self.n_head // t.size(2), 2) for t in (q, k))  # (B, T, H, N)
        dt, g = self._decay(a)  # (B, T, H, 1)
        return (q, k, v * dt, g.squeeze(-1)), (v, z), past

    def _gate(self, o, v, z):
        return self.ln_o((o + self.skip[:, None] * v).flatten(2) * F.silu(z))  # (B, T, H P)


# -----------------------------------------------------------------------------
# native sparse attention


@dataclass
class NSAState:
    """Keys and values (B, tokens, 2, Hk, D) by branch; of the compressed one, its blocks and the raw tokens that the
    next block still needs. `selected` and `blocks` have room at their ends, and double when it is used up: the context
    has no end, and no key is forgotten."""

    max_len: int
    n: int = 0  # tokens so far
    n_blocks: int = 0
    raw: torch.Tensor = None
    blocks: torch.Tensor = None
    selected: torch.Tensor = None
    window: torch.Tensor = None


class NativeSparseAttention(Attention):
    """Native sparse attention (Yuan et al. 2025, arXiv 2502.11089, section 3): three branches, each softmax attention
    on its own keys and values, weighed for each head by gates that need not sum to one,

        o_t = sum_c g_t^c Attn(q_t, K_t^c, V_t^c),   g_t = sigmoid(W_g x_t),   c = compressed, selected, window

    compressed: one key for each block of l tokens, every d; selected: the tokens of the n blocks that the compressed
    scores rank highest, the first and the two most recent among them; window: the last w tokens. H / Hk heads share
    keys, values and selection. Rotary positions turn the selected and the window branch; the compressed one has its
    slots."""

    positions = keeps_keys = True
    families = ("output gate",)

    @staticmethod
    def choose_sizes(config):
        """Compressed block, its stride, selected block, their count, window: what was set, else by block_size."""
        own = (config.nsa_compress_block, config.nsa_compress_stride, config.nsa_select_block)
        own += (config.nsa_select_count, config.nsa_window)
        return tuple(a or b for a, b in zip(own, nsa_sizes(config.block_size)))

    @classmethod
    def check(cls, config):
        check_heads(config.n_head, config.nsa_kv_head, "nsa_kv_head", "n_head")
        block, stride, select_block, count, _ = cls.choose_sizes(config)
        if block % stride or select_block % stride or block > select_block:
            sizes = f"nsa_compress_block={block}, nsa_compress_stride={stride}, nsa_select_block={select_block}"
            raise ValueError(f"the stride must divide both blocks, and the selected one be no smaller: {sizes}")
        if count < 3:
            raise ValueError(f"nsa_select_count={count}: write at least 3, the first and the two most recent blocks")

    def __init__(self, config):
        super().__init__()
        H, D, C = config.n_head, config.d_head, config.n_embd
        self.n_head, self.d_head = H, D
        self.n_kv = config.nsa_kv_head or (H // 4 if H % 4 == 0 else H)
        self.sizes = self.choose_sizes(config)
        kv = 2 * self.n_kv * D  # keys and values of a branch
        self.parts = dict(q=H * D, kv_compressed=kv, kv_selected=kv, kv_window=kv)  # the rows of c_attn
        self.c_attn = nn.Linear(C, sum(self.parts.values()), bias=config.bias)
        self.c_gate = nn.Linear(C, 3 * H)
        self.output_gate = OutputGate(config, H, D)
        self.c_proj = nn.Linear(H * D, C, bias=config.bias)
        self.mean = config.nsa_compress == "mean"
        if not self.mean:  # for keys and for values: a vector for each slot, and an MLP over the flattened block
            flat = self.sizes[0] * D
            self.slots = nn.Parameter(0.02 * torch.randn(2, self.sizes[0], D))
            self.phi_in = nn.Parameter(torch.randn(2, flat, 2 * D) / math.sqrt(flat))
            self.phi_out = nn.Parameter(torch.randn(2, 2 * D, D) / math.sqrt(2 * D))
        self.resid_dropout = make_dropout(config)
        self.rope_base = config.rope_base if config.pos_emb == "rope" else None

    def forward(self, x):
        q, raw, selected, window = self._inputs(x, 0)
        y = self._attend(x, q, self._compress(raw), selected, window, 0, "auto")
        return y, torch.zeros((), device=x.device)

    def init_state(self, batch, max_len):
        return NSAState(max_len)

    def step(self, x, state):
        (_, stride, _, _, width), n, t = self.sizes, state.n, x.size(1)
        q, raw, selected, window = self._inputs(x, n)
        raw = raw if n == 0 else torch.cat((state.raw, raw), 1)
        blocks = self._compress(raw)
        new = blocks.size(1)
        state.blocks = append(state.blocks, state.n_blocks, blocks, state.max_len // stride)
        state.selected = append(state.selected, n, selected, state.max_len)
        window = window if n == 0 else torch.cat((state.window, window), 1)
        kept = raw[:, new * stride :], window[:, -width:]
        state.raw, state.window = kept if t == 1 else (x.clone() for x in kept)  # without the rest of a prompt
        state.n, state.n_blocks = n + t, state.n_blocks + new
        caches = state.blocks[:, : state.n_blocks], state.selected[:, : state.n], window
        return self._attend(x, q, *caches, n, "gather" if t <= 16 and not x.is_cuda else "auto"), state

    def flops(self, T):
        return nsa_operations(T, self.sizes, self.n_head, self.n_kv, self.d_head, self.mean)

    @torch.no_grad()
    def stats(self, x=None):
        """With x (B, T, C): the mean gate of each branch and head (3, H), and the share of the queries of block i that
        read block j (T / l', T / l')."""
        if x is None:
            return {}
        q, raw, _, _ = self._inputs(x, 0)
        _, index = nsa_compressed(q, *self._compress(raw).unbind(2), *self.sizes[:4])
        own, size = index[..., :1].expand_as(index), self.sizes[2]
        n_blocks = -(-x.size(1) // size)
        reads = torch.bincount((own * n_blocks + index)[index >= 0], minlength=n_blocks**2).view(n_blocks, -1).float()
        return {"gate": self._gates(x).mean((0, 1)), "reads": reads / reads.diagonal()[:, None]}

    def _inputs(self, x, offset):
        q, *kv = self.c_attn(x).split(list(self.parts.values()), -1)
        q = q.unflatten(-1, (self.n_head, self.d_head))  # (B, T, H, D)
        raw, *kv = (t.unflatten(-1, (2, self.n_kv, self.d_head)) for t in kv)  # (B, T, 2, Hk, D)
        if self.rope_base is not None:
            kv = (torch.stack((rotate(t[:, :, 0], offset, self.rope_base), t[:, :, 1]), 2) for t in kv)
        return q, raw, *kv

    def _compress(self, kv):
        """(B, T, 2, Hk, D) -> its complete blocks (B, N, 2, Hk, D). Blocks overlap: a block is the sum of what its
        l / d parts give, each part taken once for each place that it has in a block."""
        (block, stride), (B, T) = self.sizes[:2], kv.shape[:2]
        r, N = block // stride, max(0, (T - block) // stride + 1)
        if N == 0:  # no block yet; a training step still owes each parameter a gradient, of 0
            parameters = () if self.mean or not torch.is_grad_enabled() else (self.slots, self.phi_in, self.phi_out)
            return kv[:, :0] + sum(p.sum() for p in parameters)
        parts = kv[:, : (N + r - 1) * stride].unflatten(1, (-1, stride))  # (B, N + r - 1, d, 2, Hk, D)
        if self.mean:
            parts = parts.mean(2)
            return sum(parts[:, i : i + N] for i in range(r)) / r
        parts = parts.permute(3, 0, 1, 4, 2, 5).flatten(4).flatten(1, 3)  # (2, B (N + r - 1) Hk, d D)
        hidden = torch.bmm(self.slots.flatten(1).unsqueeze(1), self.phi_in)[:, None, None]  # (2, 1, 1, 1, 2 D)
        for i, phi in enumerate(self.phi_in.chunk(r, 1)):
            hidden = hidden + torch.bmm(parts, phi).view(2, B, -1, self.n_kv, 2 * self.d_head)[:, :, i : i + N]
        blocks = torch.bmm(F.gelu(hidden).flatten(1, 3), self.phi_out)
        return blocks.view(2, B, N, self.n_kv, -1).permute(1, 2, 0, 3, 4)

    def _gates(self, x):
        return self.c_gate(x).sigmoid().unflatten(-1, (3, self.n_head))  # (B, T, 3, H)

    def _attend(self, x, q, blocks, selected, window, offset, backend):
        """x, q are T tokens from `offset` on; keys and values end with the last of them."""
        *sizes, width = self.sizes
        compressed, index = nsa_compressed(q, *blocks.unbind(2), *sizes, offset=offset)
        q = rotate(q, offset, self.rope_base)
        chosen = nsa_selected(q, *selected.unbind(2), index, sizes[2], backend=backend)
        near, (a, b, c) = nsa_window(q, *window.unbind(2), width), self._gates(x).unsqueeze(-1).unbind(2)
        o = torch.addcmul(torch.addcmul(a * compressed, b, chosen), c, near)  # (B, T, H, D)
        return self.resid_dropout(self.c_proj(self.output_gate(o.flatten(2), x)))


def append(buffer, n, x, room):
    """A buffer (B, tokens, ...) that holds n, with x written after them; a longer one where they do not fit."""
    m = n + x.size(1)
    if buffer is None or m > buffer.size(1):
        longer = x.new_empty(x.size(0), max(room, 2 * m if n else m), *x.shape[2:])
        if n:
            longer[:, :n] = buffer[:, :n]
        buffer = longer
    buffer[:, n:m] = x
    return buffer


ATTENTION = {  # plugins.register adds types from other files
    "softmax": SoftmaxAttention,
    "adaptive_span": AdaptiveSpan,
    "mask_mix": MaskMix,
    "gla": GatedLinearAttention,
    "gsa": GatedSlotAttention,
    "performer": PerformerAttention,
    "deltanet": DeltaNet,
    "gdn": GatedDeltaNet,
    "kda": KimiDeltaAttention,
    "mamba2": Mamba2,
    "nsa": NativeSparseAttention,
    "gated": GatedAttention,
    "gated_output": GatedOutput,
    "none": NoAttention,
}


# -----------------------------------------------------------------------------
# the model around it


class LayerNorm(nn.Module):
    """LayerNorm whose bias is optional."""

    def __init__(self, n_embd, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


def make_norm(config):
    if config.norm == "layernorm":
        return LayerNorm(config.n_embd, config.bias)
    return RMSNorm(config.n_embd) if config.norm == "rmsnorm" else nn.Identity()


def make_dropout(config):
    return nn.Dropout(config.dropout) if config.dropout else nn.Identity()  # a call less for each decoded token


class GeluMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden = config.mlp_hidden or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh" if config.gelu == "tanh" else "none")
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = make_dropout(config)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class SwigluMLP(nn.Module):
    """W_o (silu(W_g x) * W_i x) (Shazeer 2020, eq. 6); 8/3 n_embd wide it has the parameters of the GELU one."""

    def __init__(self, config):
        super().__init__()
        hidden = config.mlp_hidden or -(-8 * config.n_embd // 3 // 8) * 8
        self.c_fc = nn.Linear(config.n_embd, 2 * hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = make_dropout(config)

    def forward(self, x):
        gate, value = self.c_fc(x).chunk(2, -1)
        return self.dropout(self.c_proj(F.silu(gate) * value))


class Block(nn.Module):
    def __init__(self, config, attention_type):
        super().__init__()
        attn = ATTENTION[attention_type](config)
        self.ln_1 = make_norm(config) if any(True for _ in attn.parameters()) else nn.Identity()
        self.attn = attn
        if config.mlp != "none":
            self.ln_2 = make_norm(config)
            self.mlp = (GeluMLP if config.mlp == "gelu" else SwigluMLP)(config)
        else:
            self.mlp = None

    def forward(self, x):
        y, penalty = self.attn(self.ln_1(x))
        return self.add_mlp(x + y), penalty

    def step(self, x, state):
        y, state = self.attn.step(self.ln_1(x), state)
        return self.add_mlp(x + y), state

    def add_mlp(self, x):
        return x if self.mlp is None else x + self.mlp(self.ln_2(x))


class OneHot(nn.Module):
    """The identity as an embedding: id -> unit vector."""

    def __init__(self, vocab_size):
        super().__init__()
        self.register_buffer("identity", torch.eye(vocab_size), persistent=False)

    def forward(self, idx):
        return F.embedding(idx, self.identity)


@dataclass
class DecodeState:
    """What decoding remembers: the position, once for the whole model, and each layer's own state."""

    pos: int
    layers: list


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        if not config.vocab_size:
            raise ModelError("vocab_size=0: a model without a data set needs a vocabulary size")
        self.config = config
        self.activation_checkpointing = False
        onehot = config.embedding == "onehot"
        wte = OneHot(config.vocab_size) if onehot else nn.Embedding(config.vocab_size, config.n_embd)
        parts = {"wte": wte}
        if config.pos_emb == "learned":
            parts["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        parts["drop"] = make_dropout(config)
        parts["h"] = nn.ModuleList(Block(config, name) for name in config.types()[: config.n_layer])
        parts["ln_f"] = make_norm(config)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Identity() if onehot else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.embedding == "tied":
            self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)
        for name, p in self.named_parameters():  # GPT-2: residual projections shrink with depth
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))
        for block in self.transformer.h:
            block.attn.initialise(config)

    @staticmethod
    def _init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, all_positions=False):
        """idx, targets (B, T) ids, -1 in targets is not scored. With targets: logits (B, T, V) and the loss, which is
        cross-entropy in nats plus the penalties. Without: logits of the last position (B, 1, V), or all, and None."""
        x, penalty = self.hidden(idx)
        if targets is None:
            return self.lm_head(x if all_positions else x[:, -1:]), None
        logits = self.lm_head(x)
        return logits, cross_entropy(logits, targets) + penalty

    def hidden(self, idx):
        """(B, T) ids -> the final normed hidden states (B, T, C), and the sum of the layers' penalties."""
        x, penalty = self.embed(idx, 0), 0.0
        for block in self.transformer.h:
            if self.activation_checkpointing and self.training:
                x, p = checkpoint(block, x, use_reentrant=False)
            else:
                x, p = block(x)
            penalty = penalty + p
        return self.transformer.ln_f(x), penalty

    def embed(self, idx, pos):
        """(B, t) ids at positions pos .. pos + t - 1 -> (B, t, C)."""
        x, T = self.transformer.wte(idx), idx.size(1)
        if self.config.pos_emb == "learned":
            if pos + T > self.config.block_size:
                raise ModelError(f"{pos + T} tokens do not fit block_size={self.config.block_size}")
            x = x + self.transformer.wpe.weight[pos : pos + T]
        return self.transformer.drop(x)

    def attend(self, entries):
        """Each layer's attention of its own entry (B, T, C), as [(y, penalty)]."""
        return [block.attn(x) for block, x in zip(self.transformer.h, entries)]

    def redraw(self, step):
        for block in self.transformer.h:
            block.attn.redraw(step)

    @torch.no_grad()
    def trace(self, idx):
        """(B, T) ids -> for each layer its attention's normed input and its output, both (B, T, C)."""
        x, seen = self.embed(idx, 0), []
        for block in self.transformer.h:
            entry = block.ln_1(x)
            y, _ = block.attn(entry)
            seen.append((entry, y))
            x = block.add_mlp(x + y)
        return seen

    # decoding

    def init_state(self, batch):
        """An empty decoding state for `batch` sequences."""
        layers = [block.attn.init_state(batch, self.config.block_size) for block in self.transformer.h]
        return DecodeState(0, layers)

    @torch.no_grad()
    def step(self, idx, state):
        """idx (B, t), the next tokens -> logits (B, t, V), and the state: of block_size learned positions at most."""
        x = self.embed(idx, state.pos)
        for i, block in enumerate(self.transformer.h):
            x, state.layers[i] = block.step(x, state.layers[i])
        state.pos += idx.size(1)
        return self.lm_head(self.transformer.ln_f(x)), state

    def context_start(self, n):
        """Where the context of token n begins. Learned positions end with the block: a full block is left for its last
        half. Rotary and absent positions never end; each attention keeps what its state holds."""
        size = self.config.block_size
        if self.config.pos_emb != "learned" or n <= size:
            return 0
        hop = size - size // 2
        return -(-(n - size) // hop) * hop

    @torch.inference_mode()  # no_grad, and no bookkeeping of views: a tenth of a small model's time
    def _next_logits(self, idx, state):
        """Logits (B, V) after idx (B, n), and the state that gave them; state=None recomputes the whole context."""
        start = self.context_start(idx.size(1))
        if state is None:
            if idx.size(1) - start <= self.config.block_size:
                return self(idx[:, start:])[0][:, -1], None
            return self.step(idx, self.init_state(idx.size(0)))[0][:, -1], None
        if idx.size(1) - start <= state.pos:  # a new block has begun: its state starts from the block's own tokens
            state = self.init_state(idx.size(0))
        logits, state = self.step(idx[:, start + state.pos :], state)
        return logits[:, -1], state

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None, use_cache=True):
        """Yield the next tokens (B, 1) of idx (B, n >= 1), one at a time. temperature=0 is greedy; top_k and top_p
        narrow the choice; ids from `vocab_size` on (padding of the embedding) are never drawn. The model must be in
        eval mode. use_cache=False recomputes the context for each token: slow, and the same text."""
        if idx.size(1) < 1:
            raise ModelError("an empty prompt: write at least one token")
        if not temperature >= 0:
            raise ModelError(f"temperature={temperature}: write 0 for the likeliest token, or more")
        if top_k is not None and top_k < 1:
            raise ModelError(f"top_k={top_k}: write at least 1, or None for all tokens")
        if top_p is not None and not 0 < top_p <= 1:
            raise ModelError(f"top_p={top_p}: write a number above 0 and up to 1, or None for all tokens")
        state = self.init_state(idx.size(0)) if use_cache else None
        for _ in range(max_new_tokens):
            logits, state = self._next_logits(idx, state)
            token = sample_token(logits[:, :vocab_size].float(), temperature, top_k, top_p)
            idx = torch.cat((idx, token), 1)
            yield token

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, **options):
        """idx (B, n) with its continuation, (B, n + max_new_tokens); options as in `stream`."""
        tokens = list(self.stream(idx, max_new_tokens, temperature, top_k, top_p, **options))
        return torch.cat((idx, *tokens), 1)

    # sizes

    def num_params(self, non_embedding=True):
        """Number of parameters, by default without the position table (nanoGPT's count)."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding and "wpe" in self.transformer else n

    def flops(self, T):
        """(nominal, executed) operations of a forward pass over one sequence of T tokens: matrices and attention."""
        dense = 2 * T * sum(w.numel() for w in matrices(self))
        attention = [block.attn.flops(T) for block in self.transformer.h]
        return dense + sum(a[0] for a in attention), dense + sum(a[1] for a in attention)

    # loading

    @classmethod
    def from_checkpoint(cls, out_dir, name=None, **overrides):
        """The model of a training folder (best.pt, else ckpt.pt, else an export), also of a nanoGPT checkpoint. Config
        values in `overrides` replace the stored ones; what then does not fit is in `model.loaded`."""
        stored = read_checkpoint(out_dir, name)
        check_stored(stored, lambda: cls(stored_config(stored)))
        model = cls(stored_config(stored, **overrides))
        model.loaded = load_weights(model, stored["model"], stored_config(stored))
        return model

    @classmethod
    def from_pretrained(cls, source, **overrides):
        """The model of a Hugging Face folder or of the hub: GPT-2, gla, ... ModelError where ours computes another."""
        weights, shape = read_pretrained(source, lambda keys: cls(build(GPTConfig, keys)))
        model = cls(build(GPTConfig, shape | overrides))
        model.loaded = load_weights(model, weights, build(GPTConfig, shape))
        return model


def matrices(module):
    """Weights that multiply every token: of linear layers and of gates."""
    linear = [m.weight for m in module.modules() if isinstance(m, nn.Linear)]
    own = [getattr(m, name) for m in module.modules() for name in getattr(m, "token_weights", ())]
    return linear + [w for w in own if w is not None]


def cross_entropy(logits, targets):
    """Mean nats over the scored targets; logits (B, T, V), targets (B, T) with -1 where a position is not scored."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)


def sample_token(logits, temperature, top_k, top_p):
    """Draw ids (B, 1) from logits (B, V); see GPT.stream."""
    if not logits.amax(-1).isfinite().all():
        raise ModelError("the model's output is not a number: its weights are damaged, take another checkpoint")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-6)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:  # the smallest set of most likely ids whose probabilities reach top_p
        ordered, order = logits.softmax(-1).sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1)


# -----------------------------------------------------------------------------
# parameters


def param_groups(model):
    """{"matrix" | "vector" | "mask": [(name, parameter)]}, each parameter in exactly one. `mask` holds what the
    attention types list in `mask_parameters` (spans, periods, alphas, gates). Weight decay is for `matrix` alone."""
    groups = {"matrix": [], "vector": [], "mask": []}
    masks = {
        id(p)
        for block in model.transformer.h
        for name, p in block.attn.named_parameters()
        if name.split(".")[-1] in block.attn.mask_parameters
    }
    for name, p in model.named_parameters():
        groups["mask" if id(p) in masks else "matrix" if p.dim() >= 2 else "vector"].append((name, p))
    return groups


def own_keys(keys, pattern):
    """{key: value} of a GPTConfig without the keys of attention types that no layer of `pattern` is."""
    stray = {f.name for f in fields(GPTConfig) if stray_key(f, str(pattern), (GPTConfig,))}
    return {name: value for name, value in keys.items() if name not in stray}


def stored_config(stored, **overrides):
    """The GPTConfig of a checkpoint, with `overrides` in place of what it says. Keys of attention types that are no
    longer there go back to their defaults."""
    pattern = (stored["model_args"] | overrides).get("attention_type", GPTConfig.attention_type)
    try:
        return build(GPTConfig, own_keys(stored["model_args"], pattern) | overrides)
    except (ValueError, TypeError) as error:  # a TypeError: a key that is no text
        raise ModelError(f"{stored['path']}: {error}") from None
