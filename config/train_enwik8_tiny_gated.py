# train_enwik8_tiny.py with a gate for each pair, and a small penalty on the gates.
from config.train_enwik8_tiny import *

out_dir = ""  # its own
attention_type = "gated"
gated_reg = 1e-3  # four open heads cost 0.01 nats a token; with 1e-2 most gates close, and the loss rises
mask_learning_rate = 3e-3  # of the gates
