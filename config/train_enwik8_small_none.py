# The control: the run of train_enwik8_small.py without attention, its MLP widened until the parameters are equal again.
from config.train_enwik8_small import *

out_dir = "out/enwik8_small_none"
attention_type = "none"
mlp_hidden = 1536  # 4 n_embd^2 more parameters a layer, those of attention
