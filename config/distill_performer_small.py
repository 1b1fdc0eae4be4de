# The student of distill_small.py with Performer attention.
from config.distill_small import *

out_dir = "out/distill_performer_small"
attention_type = "performer"
