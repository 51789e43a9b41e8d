"""Other engines on the same model, machine and workload as the recipes, in an environment of their own."""
