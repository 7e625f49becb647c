"""Freed memory stays with the process inside the block, and goes back to the system after it."""

import platform
import subprocess
import sys

import pytest
import torch

from vitrail import memory
from vitrail.memory import reused_memory


@pytest.fixture
def settings(monkeypatch):
    seen = []
    monkeypatch.setattr(memory, "_keep", seen.append)
    return seen


def test_the_outermost_block_sets_and_unsets(settings):
    with reused_memory(), reused_memory():
        assert settings == [True]
    assert settings == [True, False]


def test_it_is_unset_after_an_error(settings):
    with pytest.raises(RuntimeError), reused_memory():
        raise RuntimeError
    assert settings == [True, False]


def test_as_a_decorator_of_a_function_called_twice(settings):
    @reused_memory()
    def work(a, *, b):
        return a + b

    assert [work(1, b=2), work(2, b=3)] == [3, 5]
    assert settings == [True, False, True, False]


RESIDENT = """
import os, torch
from vitrail.memory import reused_memory

def resident_mb():
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def use_200_mb():
    torch.ones(50 * 2**20)

use_200_mb()
at_first = resident_mb()
with reused_memory():
    use_200_mb()
    inside = resident_mb() - at_first
print(inside, resident_mb() - at_first)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told anything")
def test_what_was_freed_is_kept_inside_and_given_back_after():
    ran = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    inside, after = map(float, ran.stdout.split())
    assert inside > 150
    assert after < 50


@pytest.mark.parametrize("system", ["", "musl"])
def test_on_other_systems_nothing_is_done(monkeypatch, system):
    monkeypatch.setattr(platform, "libc_ver", lambda: (system, ""))
    memory._glibc.cache_clear()
    try:
        assert memory._glibc() is None
        with reused_memory():
            assert torch.ones(3).sum() == 3
    finally:
        memory._glibc.cache_clear()
