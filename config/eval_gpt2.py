# GPT-2 (124M) as published, scored on WikiText-2. Larger: --init_from=gpt2-medium, gpt2-large, gpt2-xl, or a folder.
out_dir = "out/eval_gpt2"
init_from = "gpt2"
dataset = "wikitext2"
eval_only = True

eval_context = 1024
eval_stride = 512
eval_batch_size = 4
