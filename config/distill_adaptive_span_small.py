# The student of distill_small.py with adaptive spans, which the penalty shortens from the whole block on.
from config.distill_small import *

out_dir = "out/distill_adaptive_span_small"
attention_type = "adaptive_span"
span_init = 1.0
span_reg = 1e-4
