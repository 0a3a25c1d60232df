"""Train MLPs and deep autoencoders: `python apps/train_mlp.py --data CURVES --optim kfac`."""

from common.config import parse
from common.runs import reported
from common.train_config import TrainConfig
from common.trainer import run

if __name__ == "__main__":
    with reported():
        run(parse(TrainConfig, description=__doc__))
