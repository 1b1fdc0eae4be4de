# WikiText-2 at 6.8 M parameters and 1.0 M tokens: minutes on 2 CPU cores, most of them for the head's 50,257 rows.
# --attention_type=gla, nsa, mask_mix, ... changes the attention at the same tokens and schedule.
dataset = "wikitext2"

n_layer = 2
n_head = 4
n_embd = 128
block_size = 128
dropout = 0.2

batch_size = 8
dtype = "float32"  # as in the published figures
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 100
max_iters = 1000
beta2 = 0.99
weight_decay = 0.1

eval_interval = 250
eval_iters = 20
eval_batch_size = 8
