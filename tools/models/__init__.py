"""Small models written out in plain torch, for demos, benchmarks and tests."""
