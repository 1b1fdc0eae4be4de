# The run of train_wikitext2_small.py with native sparse attention in place of softmax: same tokens, same schedule.
from config.train_wikitext2_small import *

out_dir = "out/wikitext2_small_nsa"
attention_type = "nsa"
