# The run of train_enwik8.py with a learned attention span for each head: same tokens, same schedule.
from config.train_enwik8 import *

out_dir = "out/enwik8_span"
attention_type = "adaptive_span"
span_reg = 4e-6
