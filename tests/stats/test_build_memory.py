"""A build holds the activations of one run at a time, not those of all its runs."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fisherfn as ff


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.seen = set()

    def freed(self, place, size):
        self.bytes -= size
        self.seen.discard(place)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in self.seen:
                    self.seen.add(storage.data_ptr())
                    self.bytes += storage.nbytes()
                    weakref.finalize(storage, self.freed, storage.data_ptr(), storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return out


def test_a_build_holds_a_few_times_the_activations():
    net = torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 1) for _ in range(24)))
    model, params, context = ff.functional(net)
    x = torch.rand(2, 4, 64, 64)
    activations = 24 * x.numel() * x.element_size()
    with Live() as live:
        ff.natural_gradient(model, params, x, likelihood=ff.Gaussian(), context=context)
    assert live.peak < 4.2 * activations
