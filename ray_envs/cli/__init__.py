"""Runs in a shell: the command `ray-envs`.

In: words and files of a person. Out: data on stdout, text for people on stderr, an exit code.
One module for each group of commands; `console` holds what they share. A command reads all its
input before it changes anything. It decides nothing and asks Ray nothing.
"""
