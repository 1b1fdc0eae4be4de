# The student of distill_small.py with a learned mix of five offsets in place of the causal mask.
# --train_only=masks moves the mix alone.
from config.distill_small import *

out_dir = "out/distill_mask_mix_small"
attention_type = "mask_mix"
