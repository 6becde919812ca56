"""Commands around the compiler: demos, dumps, benchmarks, and what a kernel compiles to."""
