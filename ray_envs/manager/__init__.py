"""Runs in the EnvManager actor, one in a cluster; without a cluster, in the user's process.

In: verbs with plain data. Out: plain data. It writes down what is wanted (`registry`, `demand`),
and its loop (`reconciler`) tells the agents to build it. It never runs uv and never touches the
store of a node: the agents do. The command line also reads the registry and the history.
"""
