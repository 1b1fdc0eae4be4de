"""Weights of other projects: GPT-2, the models of flash-linear-attention, and folders that transformers loads.

A table has the names of each format. A model that computes something else than ours, or ours than theirs, is refused
with the name of the option.
"""

import json
import math
import os
import shutil
from dataclasses import fields

import torch

import weights
from config import ConfigError
from data import byte_letters
from weights import ModelError, check_stored, write_atomically

# -----------------------------------------------------------------------------
# GPT-2

TURNED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def read_pretrained(source, build):
    """The tensors of a model under our names, and the keys of its shape: from the hub (`gpt2`, `gpt2-medium`, ...) or a
    local Hugging Face folder; build(keys) is our model. ModelError where a tensor is missing, or where the model
    computes what ours cannot."""
    if str(read_options(source).get("model_type")) in OURS:
        return read_linear(source, source, build)
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise ModelError("GPT-2 weights are read by transformers: pip install transformers") from None
    try:
        kind = str(GPT2Config.get_config_dict(source)[0].get("model_type", "gpt2"))  # older files do not say
        if kind in OURS:
            from huggingface_hub import snapshot_download

            folder = snapshot_download(source, allow_patterns=["*.json", "*.safetensors"])
        if kind == "gpt2":
            hf, found = GPT2LMHeadModel.from_pretrained(source, output_loading_info=True)
    except Exception as error:  # the hub's client raises a dozen kinds
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"no GPT-2 weights in {source!r}: {reason}") from None
    if kind in OURS:
        return read_linear(folder, source, build)
    if kind != "gpt2":
        known = ", ".join(OURS)
        raise ModelError(f"{source} is a model of type {kind}: only those of GPT-2, {known} have a place here")
    if found["missing_keys"]:
        raise ModelError(f"{source} lacks {', '.join(sorted(found['missing_keys']))}")
    c = hf.config
    gelu = {"gelu_new": "tanh", "gelu": "erf"}.get(c.activation_function)
    if gelu is None:
        raise ModelError(f"{source}: activation {c.activation_function!r} is not a GELU")
    fixed = dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, layer_norm_epsilon=1e-5)
    for name, ours in fixed.items():
        if getattr(c, name) != ours:
            raise ModelError(f"{source}: its {name} is {getattr(c, name)}, here it is {ours}")
    shape = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=c.n_positions)
    shape |= dict(vocab_size=c.vocab_size, bias=True, gelu=gelu, mlp_hidden=c.n_inner or 0)
    shape |= dict(embedding="tied" if c.tie_word_embeddings else "untied")
    return gpt2_names(hf.state_dict()), shape


def gpt2_names(weights):
    """Hugging Face GPT-2 tensors under our names. Its Conv1D stores (in, out), a Linear (out, in): TURNED."""
    buffers = (".attn.bias", ".attn.masked_bias")  # causal masks in older files
    kept = {name: w for name, w in weights.items() if not name.endswith(buffers)}
    return {name: w.t() if name.endswith(TURNED) else w for name, w in kept.items()}


# -----------------------------------------------------------------------------
# folders for transformers

KINDS = {"softmax": "llama", "gla": "gla", "gsa": "gsa", "deltanet": "delta_net", "gdn": "gated_deltanet"}
TYPES = {kind: name for name, kind in KINDS.items()} | {"mamba2": "mamba2"}  # softmax of learned positions is gpt2
CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "gla": "GLAForCausalLM",
    "gsa": "GSAForCausalLM",
    "delta_net": "DeltaNetForCausalLM",
    "gated_deltanet": "GatedDeltaNetForCausalLM",
}
GATED_MLP = dict(norm=["rmsnorm"], mlp=["swiglu"], bias=[False])
LINEAR = GATED_MLP | dict(pos_emb=["none", "rope"])  # rope does not reach them
DELTA = LINEAR | dict(delta_beta_max=[1.0, 2.0])
NEEDED = {  # {key: the values with which our model is one of that type}; the default for keys that are not named
    "gpt2": dict(pos_emb=["learned"], norm=["layernorm"], mlp=["gelu"]),
    "llama": GATED_MLP | dict(pos_emb=["rope"]),
    "gla": LINEAR | dict(gla_gate=["vector"], gla_gate_rank=[16], gla_gate_normalizer=[16.0]),
    "gsa": LINEAR,
    "delta_net": DELTA,
    "gated_deltanet": DELTA,
}
SIZES = "attention_type block_size vocab_size n_layer n_head n_embd dropout mlp_hidden attention_init rope_base gelu"
FREE = {  # keys whose every value is written, or has no effect there
    "gpt2": f"{SIZES} bias qkv_bias",
    "llama": f"{SIZES} n_kv_head head_dim",
    "gla": f"{SIZES} head_dim gla_n_head gla_expand_k gla_expand_v gla_gate_min",
    "gsa": f"{SIZES} head_dim gsa_n_head gsa_slots gsa_gate_normalizer",
    "delta_net": f"{SIZES} head_dim delta_n_head delta_expand_v delta_conv",
    "gated_deltanet": f"{SIZES} head_dim delta_n_head delta_expand_v delta_conv",
}


def places(layers, wte, ln_f, ln_1, ln_2, attn, projections, others):
    """{a tensor of ours: theirs, whose rows it holds one after the other}; * is the number of the layer."""
    own = {"ln_1.weight": ln_1, "attn.c_attn.weight": " ".join(f"{attn}.{name}.weight" for name in projections.split())}
    own |= {f"attn.{name}": " ".join(f"{attn}.{n}" for n in names.split()) for name, names in others.items()}
    if ln_2:
        own |= {"ln_2.weight": ln_2, "mlp.c_fc.weight": "mlp.gate_proj.weight mlp.up_proj.weight"}
        own |= {"mlp.c_proj.weight": "mlp.down_proj.weight"}
    own = {f"h.*.{ours}": " ".join(f"{layers}.*.{n}" for n in names.split()) for ours, names in own.items()}
    own |= {"wte.weight": f"{wte}.weight", "ln_f.weight": f"{ln_f}.weight"}
    return {f"transformer.{ours}": names for ours, names in own.items()} | {"lm_head.weight": "lm_head.weight"}


LAYER = ("model.layers", "model.embeddings", "model.norm", "attn_norm.weight", "mlp_norm.weight", "attn")
OUT, DECAY = {"c_proj.weight": "o_proj.weight"}, {"log_a": "A_log", "dt_bias": "dt_bias"}
DELTA_OUT = OUT | {"ln_o.weight": "o_norm.weight", "conv": "q_conv1d.weight k_conv1d.weight v_conv1d.weight"}
PLACES = {
    "llama": places(
        *("model.layers", "model.embed_tokens", "model.norm"),
        *("input_layernorm.weight", "post_attention_layernorm.weight", "self_attn", "q_proj k_proj v_proj", OUT),
    ),
    "gla": places(
        *LAYER,
        "q_proj k_proj v_proj g_proj gk_proj.0",
        OUT
        | {"c_gate.weight": "gk_proj.1.weight", "c_gate.bias": "gk_proj.1.bias"}
        | {"ln_o.weight": "g_norm_swish_gate.weight"},
    ),
    "gsa": places(*LAYER, "q_proj k_proj v_proj f_proj", OUT | {"ln_o.weight": "g_norm.weight"}),
    "delta_net": places(*LAYER, "q_proj k_proj v_proj b_proj g_proj", DELTA_OUT),
    "gated_deltanet": places(*LAYER, "q_proj k_proj v_proj b_proj g_proj a_proj", DELTA_OUT | DECAY),
    "mamba2": places(  # read_linear cuts in_proj and conv1d into parts of these names
        *("backbone.layers", "backbone.embeddings", "backbone.norm_f", "norm.weight", "", "mixer", "C B x z dt"),
        {"c_proj.weight": "out_proj.weight", "ln_o.weight": "norm.weight", "skip": "D"}
        | {"conv": "conv_C.weight conv_B.weight conv_x.weight"}
        | DECAY,
    ),
}


def check_export(form, model, codec):
    """ConfigError, before a run, where it could not write its model, or with export=hf a tokenizer, at its end."""
    try:
        import safetensors  # noqa: F401
    except ImportError:
        if form:
            raise ConfigError("export: the package is missing; pip install safetensors, or --export=False") from None
    if form == "hf":
        hf_config(model)
        hf_tokenizer(codec)


def export(form, model, out_dir, codec):
    """What --export writes: model.safetensors of a run, or with form=hf a folder for transformers."""
    if form == "hf":
        export_hf(model, out_dir, codec)
    elif form:
        weights.export(model, out_dir)


def export_hf(model, out_dir, codec):
    """out_dir/hf: config.json, model.safetensors with that config in its metadata, and a tokenizer. The folder is
    written beside the old one, and takes its place whole."""
    from safetensors.torch import save

    options, folder = json.dumps(hf_config(model), indent=1), os.path.join(out_dir, "hf")
    tokenizer, tokenizer_options = hf_tokenizer(codec)
    tokenizer_options["model_max_length"] = model.config.block_size
    contents = {
        "model.safetensors": save(hf_weights(model), {"format": "pt", "config": options}),
        "config.json": options.encode(),
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(tokenizer_options, indent=1).encode(),
    }
    temporary = folder + ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    for name, content in contents.items():
        write_atomically(os.path.join(temporary, name), lambda f, content=content: f.write(content))
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)


def hf_config(model):
    """What config.json says of our model. ConfigError, which names the key, where no type there computes the same."""
    c, types = model.config, {block.attn.__class__ for block in model.transformer.h}
    kind = KINDS.get(c.types()[0]) if len(types) == 1 else None
    if kind is None:
        raise ConfigError(
            f"export=hf: attention_type={c.attention_type}: write one of {', '.join(KINDS)}, for all layers"
        )
    kind = "gpt2" if kind == "llama" and c.pos_emb == "learned" else kind
    needed = NEEDED[kind] | dict(embedding=["tied", "untied"])
    for field in fields(c):
        name, value, allowed = field.name, getattr(c, field.name), needed.get(field.name, [field.default])
        if name not in FREE[kind].split() and value not in allowed:
            allowed = " or ".join(map(str, allowed))
            raise ConfigError(f"export=hf: {name}={value}: a model of type {kind} has {name}={allowed}")
    options = dict(model_type=kind, architectures=[CLASSES[kind]], dtype="float32", vocab_size=c.vocab_size)
    options |= dict(tie_word_embeddings=c.embedding == "tied", bos_token_id=None, eos_token_id=None)
    return options | hf_options(kind, c, model.transformer.h[0])


def hf_options(kind, c, block):
    """The options that are of one type of model, from our config and any block of the model."""
    attn, hidden = block.attn, block.mlp.c_proj.in_features
    if kind == "gpt2":
        sizes = dict(n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, n_positions=c.block_size, n_inner=hidden)
        drops = dict(resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout)
        return sizes | drops | dict(activation_function="gelu" if c.gelu == "erf" else "gelu_new")
    sizes = dict(hidden_size=c.n_embd, num_hidden_layers=c.n_layer, intermediate_size=hidden)
    sizes |= dict(max_position_embeddings=c.block_size)
    if kind == "llama":
        sizes |= dict(num_attention_heads=c.n_head, num_key_value_heads=attn.n_kv, head_dim=attn.d_head)
        return sizes | dict(rope_theta=c.rope_base, rms_norm_eps=1e-5, attention_dropout=c.dropout)
    sizes |= dict(norm_eps=1e-5, hidden_act="swish", num_heads=attn.n_head)
    if kind == "gla":
        widths = [attn.n_head * d / c.n_embd for d in (attn.d_k, attn.d_v)]
        return sizes | dict(expand_k=widths[0], expand_v=widths[1], clamp_min=c.gla_gate_min)
    if c.n_embd % attn.n_head:
        raise ConfigError(f"export=hf: n_embd={c.n_embd} is no multiple of its {attn.n_head} heads ({kind})")
    if kind == "gsa":
        return sizes | dict(num_slots=attn.n_slot, gate_logit_normalizer=attn.normalizer)
    sizes |= dict(use_gate=True, expand_v=attn.n_head * attn.d_v / c.n_embd, allow_neg_eigval=c.delta_beta_max == 2)
    sizes |= dict(use_short_conv=c.delta_conv > 0, conv_size=c.delta_conv or 4)
    return sizes | (dict(head_dim=attn.d_k) if kind == "gated_deltanet" else {})


def hf_weights(model):
    """The model's tensors under the names of transformers."""
    kind, c = hf_config(model)["model_type"], model.config
    weights = {name: w.cpu() for name, w in model.state_dict().items()}
    if c.embedding == "tied":
        del weights["lm_head.weight"]
    if kind == "gpt2":  # each linear layer and norm has a bias there: ours that have none are those of bias 0
        layers = [n.removesuffix("weight") for n in weights if n.endswith("weight") and (".h." in n or ".ln_f." in n)]
        weights = {f"{name}bias": torch.zeros(len(weights[f"{name}weight"])) for name in layers} | weights
        return {name: w.contiguous() for name, w in gpt2_names(weights).items()}
    theirs = {}
    for ours, names in tensor_names(kind, c.n_layer):
        if ours not in weights:  # the convolution, where there is none, and a tied head
            continue
        w, attn = weights[ours], model.transformer.h[0].attn
        parts = list(attn.parts.values())[: len(names)] if "conv" in ours or "c_attn" in ours else len(w) // len(names)
        if "conv" in ours:
            w = w.view(attn.conv_shape).t()[:, None]  # (channels, 1, tokens)
        theirs |= {name: part.contiguous() for name, part in zip(names, w.split(parts))}
    return theirs


def tensor_names(kind, n_layer):
    """(a tensor of ours, the names of theirs) for a model of that type."""
    for ours, theirs in PLACES[kind].items():
        for i in range(n_layer) if "*" in ours else [0]:
            yield ours.replace("*", str(i)), theirs.replace("*", str(i)).split()


def hf_tokenizer(codec):
    """tokenizer.json and tokenizer_config.json of a codec of byte strings, bytes or GPT-2's: a byte-level BPE."""
    tokens = [codec.decode_bytes([i]) for i in range(codec.vocab_size)]
    ranks = {token: i for i, token in enumerate(tokens)}
    if not all(bytes([b]) in ranks for b in range(256)):
        raise ConfigError("export=hf: the data set has a codec of symbols: a tokenizer is of bytes, or GPT-2's")
    letters = byte_letters()
    end = "<|endoftext|>"
    spelled = {t: end if t == end.encode() else "".join(letters[b] for b in t) for t in tokens}
    merges = [[spelled[part] for part in halves(t, ranks)] for t in tokens if len(t) > 1 and spelled[t] != end]
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=bool(merges))
    added = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True, content=end)
    added = [added | dict(id=i) for t, i in ranks.items() if spelled[t] == end]
    model = dict(type="BPE", vocab={spelled[t]: i for t, i in ranks.items()}, merges=merges)
    file = dict(version="1.0", added_tokens=added, pre_tokenizer=level, decoder=level, model=model)
    return file, {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"eos_token": end} if added else {})


def halves(token, ranks):
    """The two tokens that a BPE merges into this one: what the merges before it leave of its bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


# -----------------------------------------------------------------------------
# linear models of flash-linear-attention

EVERY = dict(hidden_act=["swish"], attn=[None], attnres_block_size=[None])
EXACT = dict(norm_eps=[1e-5], use_gate=[True])  # the epsilon is that of the norm of the heads' output as well
FREE_OF_CONV = dict(use_short_conv=[False], elementwise_affine=[True])
INFINITY = {"__float__": "Infinity"}  # as transformers writes it
OURS = {  # {option: the values with which such a model is ours}, its default there first, or in UNSAID
    "gla": EVERY | FREE_OF_CONV | dict(feature_map=[None], use_output_gate=[True]),
    "gsa": EVERY | FREE_OF_CONV | dict(feature_map=["swish"], expand_k=[1], expand_v=[1]),
    "delta_net": EVERY | EXACT | dict(use_beta=[True], qk_norm=["l2"], qk_activation=["silu"], expand_k=[1]),
    "gated_deltanet": EVERY | EXACT | dict(output_gate_activation=["swish", "silu"]),
    "mamba2": dict(norm_eps=[1e-5], use_bias=[False], use_conv_bias=[False], n_groups=[1], rmsnorm=[True])
    | dict(norm_before_gate=[False], D_has_hdim=[False], dt_limit=[[0, math.inf], [0, INFINITY]])
    | dict(hidden_act=["silu", "swish"]),
}
UNSAID = {"delta_net": dict(use_gate=False), "mamba2": dict(use_conv_bias=True, norm_eps=1e-5)}  # other defaults there
RENAMED = {"layer_norm_epsilon": "norm_eps", "rms_norm": "rmsnorm", "time_step_limit": "dt_limit"}  # in transformers


def read_options(folder):
    """config.json of a folder; nothing where there is none that can be read."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            options = json.load(f)
    except (OSError, ValueError, RecursionError):
        return {}
    return {RENAMED.get(name, name): value for name, value in options.items()} if isinstance(options, dict) else {}


def read_linear(folder, source, build):
    """A linear model's tensors under our names, and the keys of its shape.

    The norms of gla and gsa have any epsilon: norm(x) with e is norm(s x) with s^2 e. So what writes to the residual
    stream is multiplied by s, and the values of gla, whose output is normed, too."""
    c = read_options(folder)
    kind = c["model_type"]
    c = dict(norm_eps=1e-6) | UNSAID.get(kind, {}) | c
    same = {n: [None, c.get("num_heads")] for n in ("num_kv_heads", "num_v_heads")}
    for name, allowed in (OURS[kind] | same).items():
        if c.get(name, allowed[0]) not in allowed:
            expected = " or ".join(map(str, allowed))
            raise ModelError(f"{source}: its {name} is {c[name]}, here it is {expected}")
    try:
        keys, scale = linear_keys(kind, c), math.sqrt(1e-5 / c["norm_eps"])
    except KeyError as error:
        raise ModelError(f"{source}: its config.json lacks {error.args[0]}") from None
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ModelError(f"{source}: its config.json is of no model here: {error}") from None
    theirs = read_tensors(folder, source)
    if kind == "gla":  # with fuse_norm=False
        theirs = {name.replace(".g_norm.", ".g_norm_swish_gate."): w for name, w in theirs.items()}
    if kind == "mamba2":
        cut_mamba2(theirs, c)
    scales = dict.fromkeys(["embeddings", "o_proj", "down_proj"] + ["v_proj"] * (kind == "gla"), scale)
    absent = (".conv",) if keys.get("delta_conv") == 0 else ()
    if keys["embedding"] == "tied":  # the head is the embedding, and so multiplied
        theirs.pop("lm_head.weight", None)
        scales["norm"], absent = 1 / scale, (*absent, "lm_head.weight")
    tensors = {}
    for ours, names in tensor_names(kind, keys["n_layer"]):
        if ours.endswith(absent):
            continue
        if missing := [name for name in names if name not in theirs]:
            raise ModelError(f"{source} lacks {', '.join(missing)}")
        parts = [theirs.pop(name).float() * scales.get(name.split(".")[-2], 1.0) for name in names]
        try:
            w = torch.cat(parts)
        except RuntimeError:
            raise ModelError(f"{source}: {', '.join(names)} do not have the same width: damaged") from None
        tensors[ours] = w.squeeze(1).t().reshape(-1) if ours.endswith(".conv") else w
    if theirs:
        raise ModelError(f"{source}: {sorted(theirs)[0]} has no place in a model of type {kind} here")
    check_stored({"path": source, "model": tensors}, lambda: build(keys))
    return tensors, keys


def linear_keys(kind, c):
    """The keys of our model of that type, by the options of its config.json. KeyError where one is missing."""
    sizes = ["hidden_size", "num_hidden_layers", "num_heads", "vocab_size"]
    for name in sizes + ["expand", "state_size"] * (kind == "mamba2"):
        if type(c[name]) not in (int, float) or not c[name] > 0:
            raise ValueError(f"{name}={c[name]!r}")
    C, H = c["hidden_size"], c["num_heads"]
    keys = dict(attention_type=TYPES[kind], n_embd=C, n_layer=c["num_hidden_layers"], vocab_size=c["vocab_size"])
    keys |= dict(block_size=c.get("max_position_embeddings", 2048), n_head=1 if C % H else H, pos_emb="none")
    keys |= dict(norm="rmsnorm", mlp="swiglu", embedding="tied" if c.get("tie_word_embeddings") else "untied")
    if kind == "mamba2":
        keys |= dict(mamba2_n_head=H, mamba2_expand=c["expand"], mamba2_state=c["state_size"], mlp="none")
        return keys | dict(mamba2_conv=c["conv_kernel"])
    hidden = -(-int(C * (c.get("hidden_ratio") or 4) * 2 / 3) // 256) * 256  # as there
    keys |= dict(mlp_hidden=c.get("intermediate_size") or hidden)
    if kind == "gla":
        bound = c.get("clamp_min")
        return keys | dict(gla_n_head=H, gla_expand_k=c["expand_k"], gla_expand_v=c["expand_v"], gla_gate_min=bound)
    if kind == "gsa":
        normalizer = c.get("gate_logit_normalizer", 8)
        return keys | dict(gsa_n_head=H, gsa_slots=c["num_slots"], gsa_gate_normalizer=normalizer)
    if c.get("head_dim", C // H) * H != C:
        raise ValueError(f"head_dim={c['head_dim']} of {H} heads is not hidden_size={C}")
    keys |= dict(delta_n_head=H, delta_expand_v=c["expand_v"], delta_beta_max=2.0 if c.get("allow_neg_eigval") else 1.0)
    return keys | dict(delta_conv=c.get("conv_size", 4) if c.get("use_short_conv", True) else 0)


def read_tensors(folder, source):
    """The tensors of a folder's safetensors files."""
    from safetensors.torch import load_file

    index = os.path.join(folder, "model.safetensors.index.json")
    try:
        names = ["model.safetensors"]
        if os.path.exists(index):
            with open(index, encoding="utf-8") as f:
                names = sorted({os.path.basename(name) for name in json.load(f)["weight_map"].values()})
        return {k: w for name in names for k, w in load_file(os.path.join(folder, name)).items()}
    except Exception as error:  # safetensors has errors of its own
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"no weights in {source!r}: {reason}") from None


def cut_mamba2(tensors, c):
    """in_proj and conv1d of each layer, in place, as the parts that they hold: z, x, B, C, dt, and x, B, C."""
    x = dict(x=int(c["expand"] * c["hidden_size"]), B=c["state_size"], C=c["state_size"])
    parts = {"in_proj": dict(z=x["x"]) | x | dict(dt=c["num_heads"]), "conv1d": {f"conv_{k}": n for k, n in x.items()}}
    for name in list(tensors):
        stem, _, kind = name.removesuffix(".weight").rpartition(".")
        sizes = parts.get(kind, {})
        if len(tensors[name]) == sum(sizes.values()):
            cut = tensors.pop(name).split(list(sizes.values()))
            tensors |= {f"{stem}.{part}.weight": w for part, w in zip(sizes, cut)}
