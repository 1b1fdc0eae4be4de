# The run of train_enwik8_small.py with gated linear attention in place of softmax: same tokens, same schedule.
from config.train_enwik8_small import *

out_dir = "out/enwik8_small_gla"
attention_type = "gla"
