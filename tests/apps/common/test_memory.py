"""Freed memory stays with the process where the allocator is glibc's; elsewhere nothing is changed."""

import ctypes

from common.memory import M_MMAP_MAX, M_TRIM_THRESHOLD, keep_freed_memory


class Library:
    """A C library that records the options it is given."""

    def __init__(self):
        self.given = []

    def mallopt(self, option, value):
        self.given.append((option, value))
        return 1


def test_glibc_is_asked_to_trim_nothing_and_to_map_nothing(monkeypatch):
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert keep_freed_memory()
    assert library.given == [(M_TRIM_THRESHOLD, -1), (M_MMAP_MAX, 0)]


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()
