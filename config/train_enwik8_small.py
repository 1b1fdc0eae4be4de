# enwik8 at 3.3 M parameters and 6.1 M tokens: about half an hour on 2 CPU cores. A beginning of the file will do.
# --attention_type=gla, nsa, performer, ... changes the attention at the same tokens and schedule.
dataset = "enwik8"

n_layer = 4
n_head = 4
n_embd = 256
block_size = 256

batch_size = 16
dtype = "float32"  # as in the published figures
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 1500
beta2 = 0.99

eval_interval = 250
eval_iters = 20
