"""Runs wherever Ray is asked something: nodes, actors, connections, and Ray's errors.

In: a cluster's address, actor classes. Out: handles, facts about nodes, errors of ours.
The only folder, besides the plugin, that uses Ray's own modules. It must never depend on variants
or environments.

To change …                                           go to
nodes, agents, jobs and detached actors of a cluster  nodes
how an actor is made, found, ended                    actors
what is sent by value with each actor                 actor_shell
time limits of calls, and Ray's errors                calls
how a process connects, or embeds a Ray               connecting
agents of other nodes, and Ray objects                peers
what is packed for nodes without ray_envs; warnings   bootstrap
what runs on such a node                              bare_node
"""
