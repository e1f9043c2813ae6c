"""Photo and text encoders, and how they are named."""
