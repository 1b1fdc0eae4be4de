# The run of train_wikitext2.py with Performer attention in place of softmax: same tokens, same schedule.
from config.train_wikitext2 import *

out_dir = "out/wikitext2_performer"
attention_type = "performer"
