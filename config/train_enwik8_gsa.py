# train_enwik8.py with gated slot attention at equal parameters.
from config.train_enwik8 import *

attention_type = "gsa"
mlp_hidden = 1920  # 128 less: the gates of 4 heads of 64 slots have those parameters
