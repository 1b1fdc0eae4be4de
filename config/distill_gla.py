# distill_gpt2.py with gated linear attention.
from config.distill_gpt2 import *

attention_type = "gla"
gla_n_head = 6
gla_expand_k = 1.0  # keys as wide as the teacher's, so that its projections are the start
