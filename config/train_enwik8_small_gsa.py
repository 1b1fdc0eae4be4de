# The run of train_enwik8_small.py with gated slot attention in place of softmax: same tokens, same schedule.
from config.train_enwik8_small import *

out_dir = "out/enwik8_small_gsa"
attention_type = "gsa"
mlp_hidden = 960  # 64 less: the gates of 2 heads of 64 slots have those parameters
