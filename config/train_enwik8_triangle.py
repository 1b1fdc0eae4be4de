# The published run of the periodic-mask project: train_enwik8.py, a learned span and a learned triangle wave a head.
from config.train_enwik8_span import *

use_triangle_wave_masking = True
