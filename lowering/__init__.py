"""FX graph to plan: one stage, one file, one pure function (`pipeline.py` lists them)."""
