# The run of train_enwik8_small_span.py with a learned triangle wave for each head as well.
from config.train_enwik8_small_span import *

out_dir = "out/enwik8_small_triangle"
use_triangle_wave_masking = True
