"""Runs in the workers of prepared environments. Standard library only.

In: an item of a batch, sent by value; the environment's own files. Out: the outcome of the item.
It holds the environment while the process lives and checks the place before it runs an item. It
must start fast, and must not import anything that a worker has not imported already.

To change …                                        go to
the lock that shows that an environment is in use  hold
whether a worker is in the promised environment    check
how an item is run and reported                    item
values and errors as plain data                    outcome
sys.path: what comes first, what is shadowed       paths
how code folders are unpacked and used             code
"""
