# gated_skip_trigrams_2h3t.py for skip_trigrams_4h5t.py.
from config.gated_skip_trigrams_2h3t import *

out_dir = "out/gated_skip_trigrams_4h5t"
teacher = "out/skip_trigrams_4h5t"
dataset = "skip_trigrams"
n_head = 8
n_embd = 12
batch_size = 100
