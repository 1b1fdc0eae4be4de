# A byte model of Python's standard library, 11 M parameters, 41 M tokens: real text on every machine, no download.
out_dir = "out/stdlib"
dataset = "stdlib"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.1

batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
max_iters = 5000
eval_interval = 250
