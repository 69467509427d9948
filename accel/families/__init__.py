"""Model families. What differs between them stands in one folder each; the rest of `accel` serves any of them.

`base` is what the rest asks of a family, `registry` the list of them. This module imports neither.
"""
