# How far the penalty shortens spans: a sweep of --span_reg. A few minutes on one CPU core.
# Beside it stand --attention_type=softmax and --use_triangle_wave_masking=True.
from config.train_enwik8_tiny import *

out_dir = ""  # its own
attention_type = "adaptive_span"
mask_learning_rate = 0.03  # 300 steps, of which each moves a span's parameter by at most this

block_size = 256
batch_size = 4
max_iters = 300
eval_interval = 150
eval_iters = 10
