# enwik8 at the size of the published periodic-mask project: 38 M parameters, 4.9 G tokens, a GPU for days.
# --attention_type=gla, nsa, performer, ... changes the attention at the same tokens and schedule.
dataset = "enwik8"

n_layer = 12
n_head = 8
n_embd = 512
block_size = 512
dropout = 0.2

batch_size = 64
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 150_000
beta2 = 0.99
weight_decay = 0.1

eval_interval = 1000
eval_iters = 200
