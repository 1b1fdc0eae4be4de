# The run of train_enwik8_small.py with three layers of gated linear attention to one of softmax attention.
from config.train_enwik8_small import *

out_dir = "out/enwik8_small_hybrid"
attention_type = "gla,gla,gla,softmax"
