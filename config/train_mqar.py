# Associative recall of many keys (arXiv 2312.04927), two layers of 64 without an MLP: 1 to 5 minutes on one CPU core.
# The same width, and one head of 64 channels, for each attention type: states are 64 x 64 where they are matrices.
dataset = "mqar"  # data/mqar/prepare.py

n_layer = 2
n_head = 1
n_embd = 64
block_size = 256  # the longest records of test; those to train on have 64 tokens
pos_emb = "rope"  # of those that take them: with learned ones softmax does not find it at this rate
mlp = "none"

gla_expand_k = 1.0  # keys of 64 channels, as in the others
mamba2_expand = 1.0

batch_size = 256
dtype = "float32"
learning_rate = 3e-3
min_lr = 3e-4
warmup_iters = 50
max_iters = 600

eval_interval = 200
eval_iters = 12
log_interval = 100
eval_batch_size = 250
