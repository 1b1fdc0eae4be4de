# Parity of all symbols so far, trained at lengths 3 to 40, tested at 41 to 256 (arXiv 2411.12537, table 3).
dataset = "state_tracking"  # data/state_tracking/prepare.py

n_layer = 2
n_head = 2
n_embd = 128
block_size = 256
pos_emb = "none"

batch_size = 128
dtype = "float32"
learning_rate = 1e-3
min_lr = 1e-5
warmup_iters = 100
weight_decay = 0.1
max_iters = 2000

eval_interval = 200
eval_iters = 4
eval_batch_size = 100
log_interval = 100
