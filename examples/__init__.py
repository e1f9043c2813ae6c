"""Data directories made from public data sets.

No part of the product imports them.
"""
