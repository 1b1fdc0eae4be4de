# WikiText-2 in GPT-2's tokens: 45 M parameters, 49 M tokens, a GPU. The text is short, so dropout is high.
# --attention_type=gla, nsa, mask_mix, ... changes the attention at the same tokens and schedule.
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
