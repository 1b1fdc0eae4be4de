# GPT-2 with gated linear attention, distilled on WikiText-2: attention first, then predictions. --block_size=1024 for
# GPT-2's full context. Needs transformers, and the weights: from the hub, or --init_from=FOLDER --teacher=FOLDER.
out_dir = "out/distill_gla"
init_from = "gpt2"
teacher = "gpt2"
dataset = "wikitext2"
attention_type = "gla"
gla_n_head = 6
gla_expand_k = 1.0
distill = "kl"
distill_attention_iters = 500

block_size = 128
batch_size = 32
learning_rate = 3e-4
min_lr = 3e-5
warmup_iters = 100
max_iters = 4000

eval_interval = 250
eval_iters = 20
