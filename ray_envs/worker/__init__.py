"""Runs in the workers of prepared environments. Standard library only.

In: an item of a batch, sent by value; the environment's own files. Out: the outcome of the item.
It holds the environment while the process lives and checks the place before it runs an item. It
must start fast, and must not import anything that a worker has not imported already.
"""
