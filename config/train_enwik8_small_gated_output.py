# The run of train_enwik8_small.py with sigmoid gates on the heads' output, the MLP narrower by what the gates add.
from config.train_enwik8_small import *

out_dir = "out/enwik8_small_gated_output"
attention_type = "gated_output"
mlp_hidden = 896  # 4 n_embd, less n_embd^2 parameters a layer
