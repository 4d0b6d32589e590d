"""Runs in the user's program: a driver, a submitted job, or the command line.

In: specs, variant ids, batches. Out: options for Ray tasks, results of items.
`provider` speaks to the EnvManager through `connection`; `runner` runs batches with `dispatch`.
It never builds an environment, and never writes to the store.
"""
