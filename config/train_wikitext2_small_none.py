# The control of train_wikitext2_small.py: no attention, the MLP widened until the parameters are equal again.
from config.train_wikitext2_small import *

attention_type = "none"
mlp_hidden = 768  # 2 n_embd more: the 4 n_embd^2 parameters of attention
