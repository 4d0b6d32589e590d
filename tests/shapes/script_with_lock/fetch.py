#!/usr/bin/env -S uv run --script
#
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "six>=1.15",
#     "tabulate",
# ]
# [tool.uv]
# constraint-dependencies = ["tabulate<0.9"]
# ///
"""A script of one file."""

import six

print(six.__version__)
