# The run of train_enwik8_small.py with gates on the pairs, a small penalty on them: same tokens, same schedule.
from config.train_enwik8_small import *

out_dir = "out/enwik8_small_gated"
attention_type = "gated"
gated_reg = 1e-3
mask_learning_rate = 1e-3  # of the gates
