"""How many joined memories live at a time: those that nothing needs any more are to be gone at once."""

import gc
import weakref
from contextlib import contextmanager


@contextmanager
def counted(memory, monkeypatch):
    """memory: the library's module of that name. Gives the sizes of the living set as each joined memory is made.

    Python's own collector is off meanwhile: on a GPU it seldom runs.
    """
    alive, sizes, stock = weakref.WeakSet(), [], memory._Joined.__init__

    def made(self, *args, **options):
        stock(self, *args, **options)
        alive.add(self)
        sizes.append(len(alive))

    monkeypatch.setattr(memory._Joined, "__init__", made)
    gc.collect()
    gc.disable()
    try:
        yield sizes
    finally:
        gc.enable()
