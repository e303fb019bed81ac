"""RPAM for mergekit: merging coefficients from a pattern-labelled calibration file.

Importing this package costs nothing; the modules import torch and mergekit.
"""

__version__ = "0.1.0"
