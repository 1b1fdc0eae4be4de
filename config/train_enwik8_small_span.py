# The run of train_enwik8_small.py with a learned attention span for each head: same tokens, same schedule.
from config.train_enwik8_small import *

out_dir = "out/enwik8_small_span"
attention_type = "adaptive_span"
span_reg = 1e-4  # 1,500 steps: the published 4e-6 is for 150,000
