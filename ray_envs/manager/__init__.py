"""Runs in the EnvManager actor, one in a cluster; without a cluster, in the user's process.

In: verbs with plain data. Out: plain data. It writes down what is wanted (`registry`, `demand`),
and its loop (`reconciler`) tells the agents to build it. It never runs uv and never touches the
store of a node: the agents do. The command line also reads the registry and the history.

To change …                                          go to
the methods of the handle                            manager
how arguments become requests, and equal ones share  serving
which part gets which other parts                    wiring
the regular work besides building                    chores
the helper driver that creates the actor             start
options and leases for programs                      handing_out
create, add, update, remove, rollback, delete, pin   changes
from one generation to the next                      switching
how a spec is locked, and its key                    resolver
operations, their rows and events                    operations
variants in memory, and what is done about them      variants
what is told about a variant                         statuses
the loop that has environments built                 reconciler
nodes as the planner sees them                       views
how agents are followed                              fleet
which environments are wanted                        demand
promises to jobs                                     leases
gc                                                   collector
explain, sync, doctor                                inspector
export, import, bundles, diff                        exports
definitions on disk                                  registry
the .venv for people                                 venv_view
the sign that a manager lives                        presence
tables of events and operations                      history
the SQLite file                                      database
"""
