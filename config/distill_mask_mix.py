# The student of distill_gpt2.py with a learned mix of five offsets in place of the causal mask.
# --train_only=masks moves the mix alone.
from config.distill_gpt2 import *

out_dir = "out/distill_mask_mix"
attention_type = "mask_mix"
