# Named after a distill_*_small.py, moves that student to the teacher that train_wikitext2_tiny.py trains:
# python train.py config/distill_gla_small.py config/distill_wikitext2_tiny.py --out_dir=out/distill_gla_wikitext2
from config.train_wikitext2_tiny import *

out_dir = ""  # its own
init_from = teacher = "out/wikitext2_tiny"
distill = "kl"
distill_attention_iters = 80

batch_size = 2
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 10
max_iters = 240
eval_interval = 80
