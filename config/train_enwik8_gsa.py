# The run of train_enwik8.py with gated slot attention in place of softmax: same tokens, same schedule.
from config.train_enwik8 import *

out_dir = "out/enwik8_gsa"
attention_type = "gsa"
mlp_hidden = 1920  # 128 less: the gates of 4 heads of 64 slots have those parameters
