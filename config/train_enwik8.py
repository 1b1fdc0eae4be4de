# enwik8, 12 layers of 512: the configuration of the published periodic-mask project, with softmax attention.
out_dir = "out/enwik8"
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
