# A student of train_enwik8_tiny.py's model, around --attention_type=gsa, nsa, performer, mask_mix; minutes on a CPU.
# First each layer of attention is fed its teacher's inputs and learns its outputs. Then the student learns to predict.
from config.train_enwik8_tiny import *

out_dir = ""  # its own
init_from = teacher = "out/enwik8_tiny"
distill = "kl"
distill_attention_iters = 150

learning_rate = 3e-3  # of 1e-3, 3e-3 and 1e-2 the best for each type but adaptive_span
min_lr = 1e-4
max_iters = 500
eval_interval = 50
