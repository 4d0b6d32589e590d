"""Runs in every process of ours that writes files or starts child processes.

In: paths and bytes, command lines. Out: durable files, locks, ended processes. It knows no variant
and no environment; it never leaves a half-written file or a child that outlives its parent.

To change …                                                        go to
how files are read, written and locked                             files
how a child process is started, read, timed out and ended          processes
where local packages lie under a root, and when they go            local_wheels
which credentials this machine has, so that no output shows them   secrets
"""
