"""Stage `report`: write one self-contained HTML page about a run."""
