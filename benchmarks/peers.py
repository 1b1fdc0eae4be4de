"""python bench.py --what=ops --peers=true: what do other implementations cost, and how far are they from ours?"""

import functools
import importlib.util
import os

import torch
import torch.nn as nn

from config import ConfigError
from kernels import Case
from model import ATTENTION, GPTConfig


def layer(attn, x, *parameters):
    return attn(x)[0]


def fla_gsa(f, q, k, v, g):
    return f(q, k, v, -torch.expm1(g), g, scale=1.0)[0]


def performer_pytorch(public, ours):
    """Its causal path on a CPU, with our draw of features. The eps that it adds to them is 0 here, so that both are the
    same function; with it, a later key moves earlier outputs."""
    w, public = ours.call.args[0][0], public.performer_pytorch

    def call(q, k, v):
        q, k = (
            public.softmax_kernel(x.transpose(1, 2) * x.shape[3] ** 0.25, projection_matrix=w, is_query=is_query, eps=0)
            for x, is_query in ((q, True), (k, False))
        )  # it scales by D^(-1/4)
        return public.causal_linear_attention_noncuda(q, k, v.transpose(1, 2), eps=0).transpose(1, 2)

    return call, ours.inputs


def nsa_layer(T, H, D, n_kv):
    """Our layer with the sizes for T. All branches are computed, the window's gate alone is open: there the public
    module's definition is ours."""
    attn = ATTENTION["nsa"](GPTConfig(block_size=T, n_head=H, n_embd=H * D, attention_type="nsa", nsa_kv_head=n_kv))
    nn.init.zeros_(attn.c_gate.weight)
    attn.c_gate.bias.data = torch.tensor([-30.0, -30.0, 30.0]).repeat_interleave(H)
    return attn


def native_sparse_attention_pytorch(public, ours):
    """Its module, projections and all, with our sizes and weights; without its norm and its rotary positions."""
    attn, x = ours.call.args[0], ours.inputs[0]
    block, stride, select_block, count, window = attn.sizes
    theirs = public.SparseAttention(
        dim=x.shape[2], dim_head=attn.d_head, heads=attn.n_head, kv_heads=attn.n_kv, causal=True, norm=False,
        sliding_window_size=window - 1,  # it sees one token more than it says
        compress_block_size=block, compress_block_sliding_stride=stride, compress_mlp_expand_factor=2 / block,
        selection_block_size=select_block, num_selected_blocks=count - 1,  # and the own block
    )  # fmt: skip
    theirs.rotary_emb.rotate_queries_with_cached_keys = lambda q, k: (q, k)
    q, _, _, kv = attn.c_attn.weight.data.split(list(attn.parts.values()))
    theirs.to_qkv.weight.data = torch.cat((q, kv))
    theirs.combine_heads.weight.data = attn.c_proj.weight.data
    theirs.to_strategy_combine[0].bias.data = attn.c_gate.bias.data.view(3, -1).T.flatten()
    return lambda x, *parameters: theirs(x), [x, *(p for p in theirs.parameters() if p.requires_grad)]


NSA = "cpu", "native_sparse_attention_pytorch", None, native_sparse_attention_pytorch
PEERS = {  # name: ours, device, module, function, how it is called
    "gla, fla naive": ("gla", "cpu", "gla/naive", "naive_recurrent_gla", lambda f, *x: f(*x)[0]),
    "gsa, fla naive": ("gsa", "cpu", "gsa/naive", "naive_recurrent_gsa", fla_gsa),
    "gla, fla chunk": ("gla", "cuda", "gla", "chunk_gla", lambda f, *x: f(*x)[0]),
    "gsa, fla chunk": ("gsa", "cuda", "gsa", "chunk_gsa", fla_gsa),
    "performer, performer-pytorch": ("performer", "cpu", "performer_pytorch", None, performer_pytorch),
    "nsa layer, native-sparse-attention-pytorch": ("nsa layer", *NSA),
    "nsa layer, one key head, native-sparse-attention-pytorch": ("nsa layer, one key head", *NSA),
}
NAIVE_LIMIT = 1024  # tokens; peers on a CPU take a second for these already


def peers(rows, shape, runtime):
    """{name of a row: its kernels.Case} of the peers of `rows`, and of our layers that public layers stand beside."""
    B, T, H, K, _ = shape
    options, found = dict(device=runtime.device, dtype=getattr(torch, runtime.dtype)), {}
    for row, n_kv in (("nsa layer", H), ("nsa layer, one key head", 1)) if "nsa" in rows else ():
        attn, entry = nsa_layer(T, H, K, n_kv).to(**options), torch.randn(B, T, H * K, **options).requires_grad_()
        found[row] = Case(functools.partial(layer, attn), [entry, *attn.parameters()], None, None)
    for name, (ours, device, *_) in PEERS.items():
        near, case = device == "cuda" or T <= NAIVE_LIMIT, (rows | found).get(ours)
        if case and device == runtime.device_type and near:
            found[name] = Case(*peer(name, case), None, None)
    return found


def peer(name, ours):
    """A peer as (operator, its inputs). fla-core's naive files are read by path: it wants a GPU."""
    _, device, module, function, call = PEERS[name]
    needed = "pip install -r requirements-peers.txt -c requirements.txt"
    if not function:
        try:
            return call(importlib.import_module(module), ours)
        except ImportError as error:
            raise ConfigError(f"--peers needs {module} ({error}): {needed}") from None
    spec = importlib.util.find_spec("fla")
    if spec is None:
        raise ConfigError(f"--peers needs fla-core: {needed}")
    if device == "cuda":
        found = importlib.import_module("fla.ops." + module)
    else:
        path = os.path.join(spec.submodule_search_locations[0], "ops", module + ".py")
        file = importlib.util.spec_from_file_location(module.replace("/", "_"), path)
        found = importlib.util.module_from_spec(file)
        file.loader.exec_module(found)
    return functools.partial(call, getattr(found, function)), ours.inputs
