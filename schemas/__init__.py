"""The contracts: one module per table, each a pyarrow schema with units. Imports pyarrow only."""
