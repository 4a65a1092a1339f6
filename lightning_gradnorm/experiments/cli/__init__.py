"""The command line: `gradnorm-train`, `gradnorm-eval`, and the configurations they are made of."""
