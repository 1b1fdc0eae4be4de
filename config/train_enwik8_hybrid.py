# The run of train_enwik8.py with three layers of gated linear attention to one of softmax attention.
from config.train_enwik8 import *

out_dir = "out/enwik8_hybrid"
attention_type = "gla,gla,gla,softmax"
