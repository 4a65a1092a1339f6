"""Experiments: the command line, the report, data sets, networks. Needs ``lightning-gradnorm[experiments]``."""
