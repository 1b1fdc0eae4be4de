# train_enwik8_tiny.py with a sigmoid gate on the heads' output at equal parameters.
from config.train_enwik8_tiny import *

out_dir = ""  # its own
attention_type = "gated_output"
mlp_hidden = 448  # 4 n_embd, less n_embd^2 parameters a layer
