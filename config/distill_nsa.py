# The student of distill_gpt2.py with native sparse attention.
from config.distill_gpt2 import *

out_dir = "out/distill_nsa"
attention_type = "nsa"
