"""The science: CameNN, its losses and metrics, its loader, training and scoring. Never imports Apache Beam."""
