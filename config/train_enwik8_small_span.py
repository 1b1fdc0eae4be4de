# train_enwik8_small.py with a learned attention span for each head; --use_triangle_wave_masking=True adds a wave.
from config.train_enwik8_small import *

attention_type = "adaptive_span"
span_reg = 1e-4  # 1,500 steps: the published 4e-6 is for 150,000
