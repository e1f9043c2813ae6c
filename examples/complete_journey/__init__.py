"""A real log: the purchases of 2,469 households in 2017, as `camenn` reads them."""
