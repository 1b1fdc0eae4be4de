# The toy of skip_trigrams_2h3t.py with 4 heads for 5 trigrams.
from config.skip_trigrams_2h3t import *

out_dir = "out/skip_trigrams_4h5t"
dataset = "skip_trigrams"  # five, as prepare.py makes them
n_head = 4
n_embd = 12
