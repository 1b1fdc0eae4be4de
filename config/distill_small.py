# A student of the model that train_enwik8_tiny.py trains: its weights around another attention. That is first fed the
# teacher's inputs, to learn its attention layer by layer; then the whole student learns to predict as the teacher does.
from config.train_enwik8_tiny import *

out_dir = "out/distill_small"
init_from = teacher = "out/enwik8_tiny"
distill = "kl"
distill_attention_iters = 150

learning_rate = 3e-3  # of 1e-3, 3e-3 and 1e-2 the best for each type but adaptive_span
min_lr = 1e-4
max_iters = 500
eval_interval = 50
