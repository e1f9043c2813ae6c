"""Stage `embed`: encode every distinct photo and title of the catalog, once."""
