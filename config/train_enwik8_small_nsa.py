# The run of train_enwik8_small.py with native sparse attention in place of softmax: same tokens, same schedule.
from config.train_enwik8_small import *

out_dir = "out/enwik8_small_nsa"
attention_type = "nsa"
