"""The compiled core: caches, plans, links and transfers, without the interpreter's lock.

Each room uses itself and those before it: ``base``, ``table`` and ``plan``, ``link``, ``transfer``, ``engine``.
"""
