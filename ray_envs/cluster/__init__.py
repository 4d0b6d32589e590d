"""Runs wherever Ray is asked something: nodes, actors, connections, and Ray's errors.

In: a cluster's address, actor classes. Out: handles, facts about nodes, errors of ours.
Besides the plugin, only `ray_versions` uses Ray's private modules. It never deals with variants
or environments.

To change …                                                        go to
which nodes, agents, jobs and detached actors the manager sees     nodes
how agents of two nodes call each other and exchange data          peers
how a process connects to a cluster or starts an embedded one      connecting
which versions of Ray work, and what differs between them          ray_versions
Ray's token: used where the cluster asks for it                    tokens
how the manager and the agents start, are found and end            actors
how long a call may take, and which error the caller gets          calls
the class that Ray runs in place of an actor of ours               actor_shell
what runs on a node that lacks ray_envs                            bare_node
what is sent to such a node, and warnings about nodes              bootstrap
"""
