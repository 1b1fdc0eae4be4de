# Which part of Python's standard library is a snippet from? Any attention type; minutes on a CPU.
out_dir = "out/classify_stdlib"
dataset = "classify_stdlib"

n_layer = 2
n_head = 4
n_embd = 64
block_size = 128
pos_emb = "rope"

batch_size = 32
optimizer = "muon"
muon_learning_rate = 0.05
dtype = "float32"  # as in the published figures
learning_rate = 5e-3
min_lr = 2e-4
warmup_iters = 20
max_iters = 1500
beta2 = 0.99

eval_interval = 250
eval_iters = 40
eval_batch_size = 128
