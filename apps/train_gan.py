"""Train GANs, one optimizer per player: `python apps/train_gan.py --config apps/configs/gan/DIGITS/kfac2.yml`."""

from common.config import parse
from common.gan.config import GanConfig
from common.gan.trainer import run
from common.runs import reported

if __name__ == "__main__":
    with reported():
        run(parse(GanConfig, description=__doc__))
