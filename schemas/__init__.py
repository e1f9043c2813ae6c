"""The contracts of tables.

There is one module per table, each a pyarrow schema with units. The package imports pyarrow only.
"""
