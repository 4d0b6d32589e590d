"""Runs in the NodeAgent actor, one on each node; without a cluster, in the user's process.

In: requests of the manager, wheels from other agents. Out: environments in this node's store, and
their states. It runs uv, takes the locks and writes the records. It never decides what is wanted.
The command line also reads the store.

To change …                            go to
the verbs of the agent                 agent
what workers at the gate are told      attendant
how workers that never start are found failed_starts
the steps of a build                   provisioning
check, repair, collect, prune          maintenance
uv's commands and their errors         uv
whether an environment starts          startup
whether a Ray worker starts there      worker_start
the node's Python, platform and uv     interpreter
the folders and locks of environments  store
how uv's cache is changed              uv_cache
the layout of uv's cache               uv_entries
byte-code in uv's cache                bytecode
how damage is found                    wheels
how damage is repaired                 mending
which peers are asked for wheels       exchange
what a node sends                      sending
what a node receives                   receiving
hashes of unpacked wheels              unpacked
when unpacked code folders are deleted unpacked_code
bundles as files                       bundles
which uv may be used here              uv_trial
what doctor tests of a node            probing
sizes, and who has a file open         usage
"""
