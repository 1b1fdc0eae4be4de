# train_enwik8_small.py with a gate for each pair, and a small penalty on the gates.
from config.train_enwik8_small import *

attention_type = "gated"
gated_reg = 1e-3
mask_learning_rate = 1e-3  # of the gates
