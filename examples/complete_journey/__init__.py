"""A purchase log as `camenn` reads it.

It holds the purchases of 2,469 households in 2017.
"""
