"""Everyday training scripts, as they are written in each field: what an optimizer does where nothing was made for it.

Real data that packages ship, seconds of one core each.
"""

from bench.experiments.everyday import fields, games, images, sequences, tables

SCRIPTS = [*images.SCRIPTS, *tables.SCRIPTS, *sequences.SCRIPTS, *fields.SCRIPTS, *games.SCRIPTS]
