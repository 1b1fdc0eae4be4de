# GPT-2 with another attention (--attention_type), distilled on WikiText-2: attention first, then predictions. A GPU.
# --block_size=1024 for GPT-2's full context. Needs `pip install transformers`, and the weights: from the hub, or
# --init_from=FOLDER --teacher=FOLDER.
init_from = "gpt2"
teacher = "gpt2"
dataset = "wikitext2"
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
