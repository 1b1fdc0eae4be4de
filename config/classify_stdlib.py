# Which part of Python's standard library is a snippet from? Any attention type; minutes on a CPU.
out_dir = "out/classify_stdlib"
dataset = "classify_stdlib"

n_layer = 2
n_head = 4
n_embd = 128
block_size = 256
pos_emb = "rope"
dropout = 0.2

batch_size = 16
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 50
max_iters = 600
beta2 = 0.99

eval_interval = 100
eval_iters = 20
eval_batch_size = 64
