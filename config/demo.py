# Four minutes on two CPU cores: a byte model of the Python standard library. `make demo` runs this.
out_dir = "out/demo"
dataset = "stdlib"

n_layer = 4
n_head = 4
n_embd = 192
block_size = 128
pos_emb = "rope"

batch_size = 16
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 100
beta2 = 0.99
max_iters = 2000
max_seconds = 150  # a slower machine stops earlier; the schedule is that of max_iters

eval_interval = 250
eval_iters = 20
log_interval = 50
