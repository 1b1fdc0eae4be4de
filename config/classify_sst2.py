# SST-2: is a sentence of a film review negative or positive? Byte by byte, without pretraining; any attention type.
from config.classify_stdlib import *

out_dir = "out/classify_sst2"
dataset = "sst2"

n_layer = 4
n_embd = 128
block_size = 256
dropout = 0.2

batch_size = 64
max_iters = 5000
