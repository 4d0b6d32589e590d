"""Runs wherever Ray is asked something: nodes, actors, connections, and Ray's errors.

In: a cluster's address, actor classes. Out: handles, facts about nodes, errors of ours.
The only folder, besides the plugin, that looks into Ray's own modules. It knows nothing of
variants or environments.
"""
