"""Stack: the servers, deployments and workers that `copal up` starts on one machine."""
