"""The CameNN model, its training, evaluation and scoring.

The package has the model, its losses and metrics, its loader, training and scoring. It never
imports Apache Beam.
"""
