# WikiText-2, GPT-2's tokens: 2.4 million of them, so a small model with much dropout.
out_dir = "out/wikitext2"
dataset = "wikitext2"

n_layer = 6
n_head = 8
n_embd = 512
block_size = 512
dropout = 0.3

batch_size = 16
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 200
max_iters = 6000
beta2 = 0.99

eval_interval = 250
eval_iters = 50
