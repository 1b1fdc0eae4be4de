# OV-incoherent skip trigrams: 2 heads of softmax attention learn 3 of them, one in superposition. One layer, no MLP, no
# norms, no positions; the embedding and the head are the identity. Seconds of training.
out_dir = "out/skip_trigrams_2h3t"
dataset = "skip_trigrams_3"  # data/skip_trigrams/prepare.py --trigrams 3 --out_dir data/skip_trigrams_3

n_layer = 1
n_head = 2
head_dim = 1
n_embd = 8  # the vocabulary: A, three Bs, three Cs, BOS
block_size = 11
mlp = "none"
norm = "none"
pos_emb = "none"
embedding = "onehot"
qkv_bias = True
attention_init = "xavier"

batch_size = 250
dtype = "float32"  # as in the published figures
learning_rate = 5e-3
min_lr = 5e-5
warmup_iters = 0
weight_decay = 0.0
beta2 = 0.999
grad_clip = 0.0
max_iters = 4000

eval_interval = 2000
eval_iters = 20
eval_batch_size = 1000
log_interval = 500
