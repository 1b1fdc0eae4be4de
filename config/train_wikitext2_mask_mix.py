# The run of train_wikitext2.py in which each layer mixes the masks of the last five tokens: same tokens, same schedule.
from config.train_wikitext2 import *

out_dir = "out/wikitext2_mask_mix"
attention_type = "mask_mix"
