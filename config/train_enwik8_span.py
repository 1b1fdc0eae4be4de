# train_enwik8.py with a learned attention span for each head.
from config.train_enwik8 import *

attention_type = "adaptive_span"
span_reg = 4e-6
