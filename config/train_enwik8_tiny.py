# demo.py's model on enwik8, 4.1 M tokens: minutes on one CPU core. The teacher of distill_small.py.
from config.demo import *

out_dir = "out/enwik8_tiny"
dataset = "enwik8"
max_iters = 2000
max_seconds = 0.0
dtype = "float32"  # as in the published figures
