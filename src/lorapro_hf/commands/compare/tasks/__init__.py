"""The tasks: models, data and metrics. Built-in ones need no network."""
