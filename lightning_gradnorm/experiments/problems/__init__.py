"""Problems: a data set, its networks, losses and metrics together. Batches are ``(inputs, {task: target})``."""
