"""Runs in the NodeAgent actor, one on each node; without a cluster, in the user's process.

In: requests of the manager, wheels from other agents. Out: environments in this node's store, and
their states. It runs uv, takes the locks and writes the records. It never decides what is wanted.
The command line also reads the store.
"""
