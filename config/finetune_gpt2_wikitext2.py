# GPT-2 (124M) fine-tuned on WikiText-2; a GPU. Needs `pip install transformers`, and the weights: from the hub, or
# --init_from=FOLDER.
init_from = "gpt2"
dataset = "wikitext2"

dropout = 0.1
batch_size = 4
gradient_accumulation_steps = 8
learning_rate = 3e-5
min_lr = 3e-5
decay_lr = False
max_iters = 500

eval_interval = 50
eval_iters = 40
eval_batch_size = 4
