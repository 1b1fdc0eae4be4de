# GPT-2 with gated linear attention: embeddings, norms and MLPs are GPT-2's, attention starts from scratch. A GPU.
from config.finetune_gpt2_wikitext2 import *

attention_type = "gla"
learning_rate = 3e-4
min_lr = 3e-5
decay_lr = True
max_iters = 2000
