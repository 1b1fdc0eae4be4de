# train_enwik8_small.py with gated slot attention at equal parameters.
from config.train_enwik8_small import *

attention_type = "gsa"
mlp_hidden = 960  # 64 less: the gates of 2 heads of 64 slots have those parameters
