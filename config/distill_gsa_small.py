# The student of distill_small.py with gated slot attention.
from config.distill_small import *

out_dir = "out/distill_gsa_small"
attention_type = "gsa"
