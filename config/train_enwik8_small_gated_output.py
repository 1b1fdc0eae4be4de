# train_enwik8_small.py with a sigmoid gate on the heads' output at equal parameters.
from config.train_enwik8_small import *

attention_type = "gated_output"
mlp_hidden = 896  # 4 n_embd, less n_embd^2 parameters a layer
