# The run of train_wikitext2_small.py in which each layer mixes the masks of the last five tokens.
from config.train_wikitext2_small import *

out_dir = "out/wikitext2_small_mask_mix"
attention_type = "mask_mix"
