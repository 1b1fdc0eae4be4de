"""Runs of train.py in one group of processes, which torchrun starts once: a JSON list of their arguments.

torchrun --standalone --nproc_per_node=2 tests/many_runs.py RUNS.json
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

import config
import train
from data import DataError
from model import GPTConfig
from parallel import processes
from weights import ModelError, TrainError


def main(argv):
    torch.set_num_threads(1)
    with open(argv[0]) as f:
        runs = json.load(f)
    with processes("cpu", 60) as (world, device):
        for arguments in runs:
            model_config, cfg, given = config.load(arguments, GPTConfig, train.TrainConfig)
            if status := train.train(model_config, cfg, given, world, device):
                return status
    return 0


if __name__ == "__main__":
    config.run(main, DataError, ModelError, TrainError)
