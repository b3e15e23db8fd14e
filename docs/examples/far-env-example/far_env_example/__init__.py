"""An example of a package that extends far-env by a policy, a workload, a host and a command."""
