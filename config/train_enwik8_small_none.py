# The control of train_enwik8_small.py: no attention, the MLP widened until the parameters are equal again.
from config.train_enwik8_small import *

attention_type = "none"
mlp_hidden = 1536  # 4 n_embd^2 more parameters a layer, those of attention
