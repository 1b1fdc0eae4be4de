# The student of distill_small.py with adaptive spans. They begin as the whole block, and are the teacher exactly; the
# penalty shortens them to what each head needs.
from config.distill_small import *

out_dir = "out/distill_adaptive_span_small"
attention_type = "adaptive_span"
learning_rate = 1e-3  # it begins as its teacher
span_init = 1.0
span_param = "ratio"  # a sigmoid that begins saturated would hardly move
span_reg = 1e-4
softness_span_mask = 8.0
