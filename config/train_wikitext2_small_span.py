# train_wikitext2_small.py with a learned attention span for each head.
from config.train_wikitext2_small import *

attention_type = "adaptive_span"
span_reg = 1e-4  # 1,000 steps: the published 4e-6 is for 150,000
