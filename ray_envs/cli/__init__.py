"""Runs in a shell: the command `ray-envs`.

In: arguments and files of a user. Out: data on stdout, text for people on stderr, an exit code.
A command reads all its input before it changes anything. It imports Ray only if it needs it.
It never decides anything: it calls a provider, or reads the disk.

To change …                                                        go to
which commands there are; completion, exit codes, Ctrl-C           main
run: a batch file and its results file                             run
the progress, the table and the failures of a batch                display
up, down, runtime-env                                              cluster
create, pin, delete                                                definitions
add, update, remove, rollback, sync                                packages
export, import                                                     exports
exec                                                               execute
list, status, deps, generations, diff                              reads
operations, events                                                 history
gc, explain, doctor                                                upkeep
how variants, packages and shared options are given                arguments
options that come from the fields of a verb                        verb_options
how data, text and tables are printed                              printing
how a command opens a provider, and waits for a verb               waiting
"""
