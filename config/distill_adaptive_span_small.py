# distill_small.py with adaptive spans. They begin as the whole block, where the student is its teacher; the penalty
# then shortens each span to what its head needs.
from config.distill_small import *

attention_type = "adaptive_span"
learning_rate = 1e-3  # it begins as its teacher
span_init = 1.0
span_param = "ratio"  # a sigmoid that begins saturated would hardly move
span_reg = 1e-4
softness_span_mask = 8.0
