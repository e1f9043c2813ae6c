"""Stage `embed`: encode the catalog's distinct photos and titles once."""
