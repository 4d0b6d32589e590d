"""Runs in no process of its own: pure functions, called by client, manager and node.

In: values. Out: values that say what to do and why (`because`). No Ray, no disk, no processes, no
clock: what time it is comes in as an argument. Any input of the right type is legal.
"""
