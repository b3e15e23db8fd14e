"""An example of a distribution that adds to far-env."""
