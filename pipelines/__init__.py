"""The pipelines, one module per Beam stage.

Each is a composite PTransform and a thin main.
"""
