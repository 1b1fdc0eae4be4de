# The toy of skip_trigrams_2h3t.py with 3 heads for 4 trigrams.
from config.skip_trigrams_2h3t import *

out_dir = "out/skip_trigrams_3h4t"
dataset = "skip_trigrams_4"
n_head = 3
n_embd = 10
