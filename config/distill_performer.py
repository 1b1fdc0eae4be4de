# The student of distill_gpt2.py with Performer attention.
from config.distill_gpt2 import *

out_dir = "out/distill_performer"
attention_type = "performer"
