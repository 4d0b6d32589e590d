"""Runs in the workers of prepared environments. Standard library only.

In: an item of a batch, sent by value; the environment's files. Out: the outcome of the item.
It holds the environment while the process lives, and checks where it runs before it runs an item.
It must start fast, and must not need ray_envs in the environment: `hold` is installed there, the
rest is sent. So its modules import functions of each other, never modules.

To change …                                                        go to
how a process shows that it uses an environment                    hold
the check that a worker runs in the promised environment           check
the order of sys.path, and which module names are there twice      paths
how a code folder is unpacked and used                             code
the steps of an item, and what it reports                          item
the value or the error of an item as plain data                    outcome
how an item runs in a child process                                forked
what is restored after an item, so that later ones do not meet it  restoring
the imports of a worker, to see that it can start                    starting
"""
