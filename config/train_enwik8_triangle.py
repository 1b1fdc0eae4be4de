# The published run of the periodic-mask project: a learned span and a learned triangle wave for each head.
from config.train_enwik8_span import *

out_dir = "out/enwik8_triangle"
use_triangle_wave_masking = True
