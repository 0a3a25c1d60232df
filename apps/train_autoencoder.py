"""Train convolutional autoencoders: `python apps/train_autoencoder.py --data MNIST --optim kfac`.

Losses are per output: for DIGITS, MNIST and F_MNIST the binary cross-entropy in nats, for CIFAR10 and SVHN half the
squared error (a published mean squared error is twice that).
"""

from common.config import parse
from common.runs import reported
from common.train_config import AutoencoderConfig
from common.trainer import run

if __name__ == "__main__":
    with reported():
        run(parse(AutoencoderConfig, description=__doc__))
