# train_wikitext2_small.py with gated slot attention at equal parameters.
from config.train_wikitext2_small import *

attention_type = "gsa"
mlp_hidden = 480  # 32 less: the gates of 64 slots have those parameters
