# The demo (`make demo`): a byte model of the standard library, 0.8 M parameters, at most 210 seconds on 2 CPU cores.
out_dir = "out/demo"
dataset = "stdlib"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
pos_emb = "rope"

batch_size = 16
learning_rate = 3e-3
min_lr = 3e-4
warmup_iters = 50
beta2 = 0.99
max_iters = 1000
max_seconds = 210  # a slower machine stops earlier, at whatever loss it has then

eval_interval = 100
eval_iters = 20
log_interval = 20
eval_batch_size = 32
