"""Runs in no process of its own: pure functions, called by client, manager, node and disk.

In: values. Out: values that say what to do and why (`because`).
It never uses Ray, disks, processes or clocks: the time is an argument.
It must accept any input of the right type.

To change …                                                        go to
what each node has to build now, and the status of a variant       planning
which nodes shall have an environment                              targets
the options of a task: runtime_env and nodes                       placement
which environments are deleted                                     collecting
which requirements and Python versions are accepted                requirements
which forms a requirement in a file has: name, address, local path  entries
how the lines of a requirements file are read                      requirements_file
how the block in a script is read (PEP 723)                        scripts
how a pylock.toml is read (PEP 751)                                pylocks
what their options, indexes and hashes mean to uv                  sources
the pyproject.toml that uv resolves, and its fingerprint           resolving
what dependency groups include, and for which Python they are      groups
which extras and groups exclude each other                         choices
what a lock installs, and the key of an environment                locks
which sources of a project are local, and what replaces them       local_sources
what the wheel of a local package is, also in an export            local_wheels
how packages are added, removed or upgraded in a definition        edits
what the operator's settings forbid                                policy
which secrets are hidden or refused                                credentials
the description of wheels that nodes send to each other            packs
how TOML and JSON of people are parsed, and their limits            parsing
"""
