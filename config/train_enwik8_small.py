# enwik8 at a size that a 2-core CPU trains in minutes; works on a prefix of the file as well.
out_dir = "out/enwik8_small"
dataset = "enwik8"

n_layer = 4
n_head = 4
n_embd = 256
block_size = 256

batch_size = 16
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 1500
beta2 = 0.99

eval_interval = 250
eval_iters = 20
