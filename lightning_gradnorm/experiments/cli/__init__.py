"""The command line: `gradnorm-train`, `gradnorm-eval`, `gradnorm-report`, and their configurations."""
