# The run of train_enwik8.py with native sparse attention in place of softmax: same tokens, same schedule.
from config.train_enwik8 import *

out_dir = "out/enwik8_nsa"
attention_type = "nsa"
