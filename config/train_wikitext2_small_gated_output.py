# train_wikitext2_small.py with a sigmoid gate on the heads' output at equal parameters.
from config.train_wikitext2_small import *

attention_type = "gated_output"
mlp_hidden = 448  # n_embd / 2 less: the gate has n_embd^2 parameters
