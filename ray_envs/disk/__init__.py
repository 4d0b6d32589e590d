"""Runs in every process of ours that writes files or starts child processes.

In: paths and bytes, command lines. Out: durable files, locks, ended processes. It knows no variant
and no environment; it never leaves a half-written file or a child that outlives its parent.

To change …                                        go to
atomic writes, locks, reading with errors of ours  files
how a child process is run and ended               processes
"""
