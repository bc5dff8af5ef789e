"""Who is there, who is lost, and the environment that a run depends on."""
