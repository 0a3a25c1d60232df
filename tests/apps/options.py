"""The options that only natural gradients have, for tests that train any optimizer."""


def curvature(arguments, *options):
    """Return these options of a curvature, unless the arguments choose an optimizer without one."""
    return () if {"sgd", "adam"} & {*arguments} else options


def cadence(arguments):
    """Return a cadence for short runs."""
    return curvature(arguments, "--update_every", "2", "--invert_every", "3")


def safe(optim):
    """Return a damping and a KL bound with which small nets train."""
    return curvature([optim], "--damping", "1", "--kl_bound", "0.1")
