# The run of train_enwik8_tiny.py with gates on the pairs: 1 % of the mean of (sum_h gamma^0.6)^(1 / 0.6) is penalised.
from config.train_enwik8_tiny import *

out_dir = "out/enwik8_tiny_gated"
attention_type = "gated"
gated_reg = 0.01  # four open heads cost 0.1 nats: gates that lower the loss by less than they cost close
mask_learning_rate = 3e-3  # of the gates
