"""Train convolutional classifiers: `python apps/train_cnn.py --model resnet18 --data CIFAR10 --optim kfac`.

Images are 32×32: DIGITS is resampled, other smaller images are padded with zeros.
"""

from common.config import parse
from common.runs import reported
from common.train_config import CnnConfig
from common.trainer import run

if __name__ == "__main__":
    with reported():
        run(parse(CnnConfig, description=__doc__))
