"""The machines of a run: which are there, which are lost, the environment variables they need."""
