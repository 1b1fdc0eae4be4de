# The run of train_wikitext2.py with native sparse attention in place of softmax: same tokens, same schedule.
from config.train_wikitext2 import *

out_dir = "out/wikitext2_nsa"
attention_type = "nsa"
