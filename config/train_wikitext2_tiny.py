# WikiText-2 at the smallest size that still uses its context; minutes on a CPU. distill_wikitext2_tiny.py's teacher.
from config.demo import *

out_dir = "out/wikitext2_tiny"
dataset = "wikitext2"

n_embd = 64
batch_size = 4  # most operations are the output head's 50,257 rows
max_iters = 600
max_seconds = 0.0
dtype = "float32"  # as in the published figures

eval_interval = 200
eval_batch_size = 8
