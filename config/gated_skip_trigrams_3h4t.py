# gated_skip_trigrams_2h3t.py for skip_trigrams_3h4t.py.
from config.gated_skip_trigrams_2h3t import *

out_dir = "out/gated_skip_trigrams_3h4t"
teacher = "out/skip_trigrams_3h4t"
dataset = "skip_trigrams_4"
n_head = 6
n_embd = 10
