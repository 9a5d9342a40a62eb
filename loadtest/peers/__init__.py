"""What the gateway is measured against, each in a few lines and as its own users would write it. `docs/benchmarks.md` compares them."""
