# The student of distill_small.py with native sparse attention.
from config.distill_small import *

out_dir = "out/distill_nsa_small"
attention_type = "nsa"
