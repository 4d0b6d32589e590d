"""Runs in the user's program: a driver, a submitted job, or the command line.

In: specs, variant ids, batches. Out: options for Ray tasks, results of items.
It calls the EnvManager through `connection`, and starts the items of a batch as Ray tasks.
It never builds an environment, and never writes to the store.

To change …                                                        go to
what a program can call: define, prepare, options, …               variants
what other batch runners call: create_environment, …               environments
what a status means: done, ready nodes, failures                   statuses
the provider of a cluster or of this machine; ask()                provider
verbs of a variant's life: add, update, rollback, export, …        lifecycle
how a verb is called, repeated, cancelled                          connection
the provider for tests without Ray                                 in_memory
how batch files and specs are read                                 inputs
how local packages are found and built                             local_packages
when a local package is built again                                source_states
which uv workspace a project belongs to                            workspaces
how requirements files, scripts and pylock.toml are found          source_files
which encodings a text may have                                    texts
the results file: earlier results, what is never overwritten       results
how an entrypoint is checked without importing it                  entrypoints
which files a code folder contains, and their archive              code_folder
the runner: which items, earlier results, states, progress         runner
when an item starts; what happens while the manager is away        item_queue
which cases there are, also of a generator                         cases
the items that wait for their start                                waiting
which item is next, and which nodes have room for it               scheduling
how an item starts, is watched, times out, is started again        dispatch
what becomes of an item whose task was lost                        losses
how a batch notices that its cluster has ended                     cluster_watch
which nodes live, while the head may be gone                       node_table
why the workers of a variant do not start                          start_checks
how many items share a Ray task, and where they are                lanes
what is sent to the workers                                        payload
an item, and how its result is made                                items
"""
