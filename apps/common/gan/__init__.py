"""Wasserstein GANs with gradient penalty, each player with its own optimizer: `python apps/train_gan.py`."""
