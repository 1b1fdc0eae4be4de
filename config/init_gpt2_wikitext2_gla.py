# Gated linear attention inside GPT-2: embeddings, norms and MLPs are GPT-2's, attention starts from scratch.
from config.finetune_gpt2_wikitext2 import *

out_dir = "out/gpt2_wikitext2_gla"
attention_type = "gla"
learning_rate = 3e-4
min_lr = 3e-5
decay_lr = True
max_iters = 2000
