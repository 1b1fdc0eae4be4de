# distill_small.py with gated linear attention.
from config.distill_small import *

attention_type = "gla"
gla_expand_k = 1.0  # keys as wide as the teacher's, so that its projections are the start
