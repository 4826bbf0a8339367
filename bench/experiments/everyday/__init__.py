"""Everyday training scripts, as they are written in each field: what an optimizer does where nothing was made for it.

Real data that packages ship, seconds of one core each.
"""

from bench.experiments.everyday import densities, fields, games, images, sequences, structures, tables, text

SCRIPTS = [
    *images.SCRIPTS,
    *tables.SCRIPTS,
    *sequences.SCRIPTS,
    *fields.SCRIPTS,
    *games.SCRIPTS,
    *text.SCRIPTS,
    *densities.SCRIPTS,
    *structures.SCRIPTS,
]
