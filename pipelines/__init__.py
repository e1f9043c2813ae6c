"""The plant: one module per Beam stage, each a composite PTransform and a thin main."""
