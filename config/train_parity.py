# Parity of all symbols so far, trained at lengths 3 to 40 and tested at 41 to 256 (arXiv 2411.12537, table 3): minutes.
# Some seeds of deltanet and gdn are right at all lengths; with --delta_beta_max=1.0 they stay at chance beyond 40.
dataset = "state_tracking"  # data/state_tracking/prepare.py

attention_type = "deltanet"
delta_beta_max = 2.0
delta_n_head = 8  # gdn needs one head, among those that begin slowly, that hardly forgets
delta_conv = 0  # with one, keys differ by their neighbours, and what is learnt fades beyond 100 tokens

n_layer = 2
n_head = 4
n_embd = 128
block_size = 256
pos_emb = "none"

batch_size = 64
dtype = "float32"
learning_rate = 3e-3
min_lr = 1e-5
warmup_iters = 100
max_iters = 400

eval_interval = 200
eval_iters = 4
eval_batch_size = 100
log_interval = 100
